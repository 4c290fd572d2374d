"""Pipelines of diffusers, a tiny one of random weights for each family, and how each is called.

`PIPELINES[name]()` gives (pipe, arguments of its call): two steps, images of some 16 pixels. Text
encoders are left out where the pipeline takes embeddings. `written(pipe, folder)` is the same
pipeline as save_pretrained and from_pretrained leave it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import zoo
from tests.stable_diffusion import tokenizer

Built = tuple[Any, dict[str, Any]]

PIPELINES: dict[str, Callable[[], Built]] = {}
"""The builders by the name of the family."""

WIDTH = 16  # of text embeddings
STEPS: dict[str, Any] = {"num_inference_steps": 2}


def family(build: Callable[[], Built]) -> Callable[[], Built]:
    """Enter a builder in the table; its weights are always the same."""

    def built() -> Built:
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            pipe, options = build()
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
                    for parameter in part.parameters():
                        if not parameter.any():  # diffusers sets to zero what ends a block
                            parameter.normal_(std=0.02)
        pipe.set_progress_bar_config(disable=True)
        return pipe, STEPS | options

    PIPELINES[build.__name__] = built
    return built


def written(pipe: Any, folder: Path) -> Any:
    """`pipe` written to `folder` by save_pretrained and read again."""
    import diffusers

    pipe.save_pretrained(folder)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    read = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    read.set_progress_bar_config(disable=True)
    return read


def with_text(pipe: Any) -> Any:
    """`pipe`, of the Stable Diffusion family, with a tiny CLIP text encoder and its tokenizer."""
    pipe.register_modules(text_encoder=clip_text().eval(), tokenizer=clip_tokenizer())
    return pipe


# ---------------------------------------------------------------------------- parts


def text(tokens: int = 77, width: int = WIDTH, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, width)


def both(tokens: int = 77, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of its negative."""
    return {"prompt_embeds": text(tokens, width), "negative_prompt_embeds": text(tokens, width)}


def image(size: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, size, size)


def clip_tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer(Path(folder))


def _clip(kind: str, **more: Any) -> Any:
    import transformers

    words = clip_tokenizer()
    config = getattr(transformers, f"CLIP{kind}Config")
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    if kind == "Text":
        sizes |= {"vocab_size": len(words), "bos_token_id": words.bos_token_id}
        sizes |= {"eos_token_id": words.eos_token_id}
    return config(num_hidden_layers=2, projection_dim=WIDTH, **sizes, **more)


def clip_text(projected: bool = False) -> Any:
    import transformers

    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, kind)(_clip("Text"))


def clip_vision() -> Any:
    import transformers

    config = _clip("Vision", image_size=16, patch_size=8)
    return transformers.CLIPVisionModelWithProjection(config)


def clip_images() -> Any:
    import transformers

    return transformers.CLIPImageProcessor(crop_size=16, size=16)


def vae(channels: int = 4, **more: Any) -> Any:
    """An AutoencoderKL of factor 2."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=channels,
        **more,
    )


def unet(**more: Any) -> Any:
    import diffusers

    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**sizes | more)


def plain_unet(channels: int = 3) -> Any:
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def transformer(name: str, **more: Any) -> Any:
    """The reduced transformer of tests/zoo.py, with some settings otherwise."""
    import diffusers

    values = zoo.config(name) | more
    return getattr(diffusers, values.pop("_class_name")).from_config(values)


def sd_scheduler(kind: str = "PNDMScheduler", **more: Any) -> Any:
    import diffusers

    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    if kind == "PNDMScheduler":
        settings |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    return getattr(diffusers, kind)(**settings | more)


def flow(**more: Any) -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def sd_parts(**more: Any) -> dict[str, Any]:
    """The components of Stable Diffusion, without text encoder."""
    parts = {
        "vae": vae(),
        "unet": unet(),
        "scheduler": sd_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        "text_encoder": None,
        "tokenizer": None,
    }
    return parts | more


def plain_text(kind: Any, **parts: Any) -> Any:
    """A pipeline of `kind` without text encoder and tokenizer."""
    return kind(text_encoder=None, tokenizer=None, **parts)


# ---------------------------------------------------------------------------- Stable Diffusion


@family
def sd15() -> Built:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**sd_parts()), both() | {"height": 16, "width": 16}


@family
def sd15_text() -> Built:
    """With a text encoder, called by prompts."""
    from diffusers import StableDiffusionPipeline

    pipe = with_text(StableDiffusionPipeline(**sd_parts()))
    return pipe, {"prompt": ["a cat", "two dogs"]}


@family
def sd21() -> Built:
    """With v-prediction and the number of heads by level."""
    from diffusers import StableDiffusionPipeline

    denoiser = unet(attention_head_dim=(2, 4), use_linear_projection=True)
    scheduler = sd_scheduler("DDIMScheduler", prediction_type="v_prediction")
    return StableDiffusionPipeline(**sd_parts(unet=denoiser, scheduler=scheduler)), both()


@family
def sd_image_to_image() -> Built:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**sd_parts())
    return pipe, both() | {"image": image(), "strength": 0.75, "num_inference_steps": 4}


@family
def sd_inpainting() -> Built:
    from diffusers import StableDiffusionInpaintPipeline

    pipe = StableDiffusionInpaintPipeline(**sd_parts(unet=unet(in_channels=9)))
    mask = (torch.rand(1, 1, 16, 16) > 0.5).float()
    return pipe, both() | {"image": image(), "mask_image": mask, "height": 16, "width": 16}


def controlnet(of: Any) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(4, 8))


@family
def sd_controlnet() -> Built:
    from diffusers import StableDiffusionControlNetPipeline

    parts = sd_parts()
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet(parts["unet"]))
    return pipe, both() | {"image": image()}


@family
def sd_t2i_adapter() -> Built:
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    adapter = T2IAdapter(
        in_channels=3,
        channels=[8, 16],
        num_res_blocks=1,
        downscale_factor=2,
        adapter_type="full_adapter",
    )
    denoiser = unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionAdapterPipeline(**sd_parts(unet=denoiser), adapter=adapter)
    return pipe, both() | {"image": image()}


@family
def sd_ip_adapter() -> Built:
    """With the weights of an IP-Adapter loaded, and the image given as embeddings."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(**sd_parts())
    denoiser = pipe.unet
    keys, number = {}, 1
    for name in denoiser.attn_processors:
        if name.endswith("attn2.processor"):
            width = denoiser.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("k", "v"):
                keys[f"{number}.to_{part}_ip.weight"] = torch.randn(width, WIDTH) / 4
            number += 2
    proj = {
        "proj.weight": torch.randn(4 * WIDTH, WIDTH) / 4,
        "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    denoiser._load_ip_adapter_weights([{"image_proj": proj, "ip_adapter": keys}])
    embeds = [torch.randn(2, 1, WIDTH)]
    return pipe, both() | {"ip_adapter_image_embeds": embeds}


@family
def sdxl() -> Built:
    from diffusers import StableDiffusionXLPipeline

    denoiser = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    pipe = plain_text(
        StableDiffusionXLPipeline,
        vae=vae(),
        unet=denoiser,
        scheduler=sd_scheduler("EulerDiscreteScheduler"),
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    pooled = {"pooled_prompt_embeds": text(1)[0], "negative_pooled_prompt_embeds": text(1)[0]}
    return pipe, both() | pooled | {"height": 16, "width": 16}


@family
def kandinsky() -> Built:
    from diffusers import DDIMScheduler, KandinskyV22Pipeline, VQModel

    denoiser = unet(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=WIDTH,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    movq = VQModel(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
    )
    pipe = KandinskyV22Pipeline(unet=denoiser, movq=movq, scheduler=DDIMScheduler())
    embeds = {"image_embeds": text(1)[0], "negative_image_embeds": text(1)[0]}
    return pipe, embeds | {"height": 32, "width": 32}


@family
def animate_diff() -> Built:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    motion = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=2,
        motion_max_seq_length=8,
    )
    parts = sd_parts(scheduler=sd_scheduler("DDIMScheduler"))
    for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        del parts[name]
    pipe = AnimateDiffPipeline(**parts, motion_adapter=motion)
    return pipe, both() | {"num_frames": 4, "height": 16, "width": 16}


@family
def svd() -> Built:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    denoiser = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        num_attention_heads=(2, 2),
        layers_per_block=1,
        num_frames=2,
        cross_attention_dim=WIDTH,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    decoder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    scheduler = sd_scheduler(
        "EulerDiscreteScheduler",
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    pipe = StableVideoDiffusionPipeline(
        vae=decoder,
        image_encoder=clip_vision(),
        unet=denoiser,
        scheduler=scheduler,
        feature_extractor=clip_images(),
    )
    return pipe, {"image": image(), "height": 16, "width": 16, "num_frames": 2}


# ---------------------------------------------------------------------------- without text


@family
def ddpm() -> Built:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(unet=plain_unet(), scheduler=DDPMScheduler()), {"batch_size": 2}


@family
def ddim() -> Built:
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(unet=plain_unet(), scheduler=DDIMScheduler()), {"batch_size": 2}


@family
def ldm() -> Built:
    from diffusers import LDMPipeline, VQModel

    vq = VQModel(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
        num_vq_embeddings=8,
    )
    pipe = LDMPipeline(vqvae=vq, unet=plain_unet(), scheduler=sd_scheduler("DDIMScheduler"))
    return pipe, {"batch_size": 2}


@family
def dit() -> Built:
    from diffusers import DDIMScheduler, DiTPipeline

    denoiser = transformer("dit-xl-2", sample_size=8, num_embeds_ada_norm=1000)
    labels = {i: f"class {i}" for i in range(10)}
    pipe = DiTPipeline(transformer=denoiser, vae=vae(), scheduler=DDIMScheduler(), id2label=labels)
    pipe.labels = {name: i for i, name in labels.items()}
    return pipe, {"class_labels": [1, 2]}


# ---------------------------------------------------------------------------- transformers


@family
def pixart_alpha() -> Built:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    pipe = plain_text(
        PixArtAlphaPipeline,
        vae=vae(),
        transformer=transformer("pixart-alpha", sample_size=8),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return pipe, _masked() | {"height": 16, "width": 16, "use_resolution_binning": False}


@family
def pixart_sigma() -> Built:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    pipe = plain_text(
        PixArtSigmaPipeline,
        vae=vae(),
        transformer=transformer("pixart-sigma", sample_size=8),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return pipe, _masked() | {"height": 16, "width": 16, "use_resolution_binning": False}


def _masked(tokens: int = 12, width: int = 32) -> dict[str, Any]:
    """Embeddings of a prompt and its negative, some tokens of which are padding."""
    mask = torch.ones(1, tokens, dtype=torch.int64)
    mask[:, tokens // 2 :] = 0
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}
    return both(tokens, width) | masks | {"negative_prompt": None}


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
    second = {f"{name}_2": value for name, value in _masked(12).items() if "mask" in name}
    embeds = {f"{name}_2": value for name, value in both(12, 32).items()}
    first = _masked(8)
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
    options = _masked() | {"use_resolution_binning": False, "complex_human_instruction": None}
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
    options = _masked()
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
    options = _masked()
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


# ---------------------------------------------------------------------------- video


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
    options = _masked()
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
    options = _masked()
    del options["negative_prompt"]
    return pipe, options | {"height": 16, "width": 16, "num_frames": 7}
