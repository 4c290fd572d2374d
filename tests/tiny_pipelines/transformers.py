"""Pipelines of images whose denoiser is a transformer."""

from __future__ import annotations

import torch

from .parts import Built, both, family, flow, masked, plain_text, text, transformer, vae


@family
def pixart_alpha() -> Built:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    pipe = plain_text(
        PixArtAlphaPipeline,
        vae=vae(),
        transformer=transformer("pixart-alpha", sample_size=8),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return pipe, masked() | {"height": 16, "width": 16, "use_resolution_binning": False}


@family
def pixart_sigma() -> Built:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    pipe = plain_text(
        PixArtSigmaPipeline,
        vae=vae(),
        transformer=transformer("pixart-sigma", sample_size=8),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return pipe, masked() | {"height": 16, "width": 16, "use_resolution_binning": False}


@family
def sd3() -> Built:
    from diffusers import StableDiffusion3Pipeline

    pipe = plain_text(
        StableDiffusion3Pipeline,
        transformer=transformer("sd3", sample_size=8, in_channels=4, out_channels=4),
        scheduler=flow(shift=3.0),
        vae=vae(),
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pooled = {
        "pooled_prompt_embeds": text(1, 32)[0],
        "negative_pooled_prompt_embeds": text(1, 32)[0],
    }
    return pipe, both(20, 32) | pooled | {"height": 16, "width": 16}


@family
def flux() -> Built:
    from diffusers import FluxPipeline

    pipe = plain_text(
        FluxPipeline,
        transformer=transformer("flux-dev"),
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae(4),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    embeds = {"prompt_embeds": text(12, 32), "pooled_prompt_embeds": text(1, 32)[0]}
    return pipe, embeds | {"height": 16, "width": 16}


@family
def chroma() -> Built:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    denoiser = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    pipe = plain_text(
        ChromaPipeline,
        transformer=denoiser,
        scheduler=flow(),
        vae=vae(4),
    )
    mask = torch.ones(1, 12)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return pipe, both(12, 32) | masks | {"height": 16, "width": 16}


@family
def qwen_image() -> Built:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

    pipe = plain_text(
        QwenImagePipeline,
        transformer=transformer("qwen-image", in_channels=16, out_channels=4),
        scheduler=flow(),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
    )
    mask = torch.ones(1, 12, dtype=torch.int64)
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    return pipe, both(12, 32) | masks | {"height": 16, "width": 16, "true_cfg_scale": 2.0}


@family
def hunyuan_dit() -> Built:
    from diffusers import DDPMScheduler, HunyuanDiTPipeline

    pipe = plain_text(
        HunyuanDiTPipeline,
        vae=vae(),
        transformer=transformer("hunyuan-dit", sample_size=8, num_layers=2),
        scheduler=DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    second = {f"{name}_2": value for name, value in masked(12).items() if "mask" in name}
    embeds = {f"{name}_2": value for name, value in both(12, 32).items()}
    first = masked(8)
    del first["negative_prompt"]
    return pipe, first | second | embeds | {
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
    }


@family
def sana() -> Built:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    denoiser = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
        patch_size=1,
    )
    decoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    pipe = plain_text(
        SanaPipeline,
        transformer=denoiser,
        vae=decoder,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )
    options = masked() | {"use_resolution_binning": False, "complex_human_instruction": None}
    return pipe, options | {"height": 32, "width": 32}


@family
def aura_flow() -> Built:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    denoiser = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    pipe = plain_text(AuraFlowPipeline, vae=vae(), transformer=denoiser, scheduler=flow(shift=1.73))
    options = masked()
    del options["negative_prompt"]
    return pipe, options | {"height": 16, "width": 16}


@family
def lumina2() -> Built:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    denoiser = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[128, 128, 128],
        cap_feat_dim=32,
    )
    pipe = plain_text(Lumina2Pipeline, transformer=denoiser, vae=vae(), scheduler=flow())
    options = masked()
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        options[name] = torch.ones_like(options[name])
    del options["negative_prompt"]
    return pipe, options | {"height": 32, "width": 32}


@family
def z_image() -> Built:
    from diffusers import ZImagePipeline

    pipe = plain_text(
        ZImagePipeline, transformer=transformer("z-image"), vae=vae(), scheduler=flow(shift=3.0)
    )
    embeds = {"prompt_embeds": [text(12, 32)[0]], "negative_prompt_embeds": [text(10, 32)[0]]}
    return pipe, embeds | {"height": 32, "width": 32}
