"""Pipelines whose denoiser is a UNet."""

from __future__ import annotations

from typing import Any

import torch

from .parts import (
    WIDTH,
    Built,
    both,
    clip_images,
    clip_vision,
    family,
    image,
    plain_text,
    plain_unet,
    sd_parts,
    sd_scheduler,
    text,
    transformer,
    unet,
    vae,
    with_text,
)


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
