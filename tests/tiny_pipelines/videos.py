"""Pipelines of videos."""

from __future__ import annotations

from typing import Any

import torch

from .parts import Built, both, family, flow, masked, plain_text, text, transformer


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


VIDEO: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 5}


@family
def wan() -> Built:
    from diffusers import WanPipeline

    pipe = plain_text(
        WanPipeline,
        vae=wan_vae(),
        transformer=transformer("wan-1.3b", attention_head_dim=12, ffn_dim=32),
        scheduler=flow(shift=7.0),
    )
    return pipe, both(12, 32) | VIDEO


@family
def wan22() -> Built:
    """With two transformers, one for the noisy steps and one for the rest."""
    from diffusers import WanPipeline

    small: dict[str, Any] = {"attention_head_dim": 12, "ffn_dim": 32}
    pipe = plain_text(
        WanPipeline,
        vae=wan_vae(),
        transformer=transformer("wan-1.3b", **small),
        transformer_2=transformer("wan-1.3b", **small),
        boundary_ratio=0.875,
        scheduler=flow(shift=7.0),
    )
    return pipe, both(12, 32) | VIDEO | {"num_inference_steps": 4}


@family
def cogvideox() -> Built:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

    decoder = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    denoiser = transformer(
        "cogvideox-2b", num_attention_heads=2, sample_width=2, sample_height=2, sample_frames=9
    )
    pipe = plain_text(
        CogVideoXPipeline, vae=decoder, transformer=denoiser, scheduler=CogVideoXDDIMScheduler()
    )
    return pipe, both(8, 32) | VIDEO | {"num_frames": 9}


@family
def hunyuan_video() -> Built:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline

    decoder = AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )
    pipe = plain_text(
        HunyuanVideoPipeline,
        transformer=transformer("hunyuan-video", num_layers=1, num_single_layers=1),
        vae=decoder,
        scheduler=flow(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    mask = torch.ones(1, 12, dtype=torch.int64)
    embeds = {"prompt_embeds": text(12, 32), "pooled_prompt_embeds": text(1, 32)[0]}
    return pipe, embeds | VIDEO | {"prompt_attention_mask": mask}


@family
def ltx() -> Built:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    denoiser = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    decoder = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    pipe = plain_text(LTXPipeline, transformer=denoiser, vae=decoder, scheduler=flow())
    options = masked()
    del options["negative_prompt"]
    return pipe, options | {"height": 32, "width": 32, "num_frames": 9}


@family
def mochi() -> Built:
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    denoiser = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=12,
    )
    decoder = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = plain_text(MochiPipeline, transformer=denoiser, vae=decoder, scheduler=flow())
    options = masked()
    del options["negative_prompt"]
    return pipe, options | {"height": 16, "width": 16, "num_frames": 7}
