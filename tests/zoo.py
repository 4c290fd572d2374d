"""Denoisers of diffusers by name: as published, or with the same topology at a small width."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.capture.diffusers_inputs import example_inputs

CONFIGS = Path(__file__).parent / "configs"
Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One denoiser and how it is called.

    config: name of the published configuration in tests/configs.
    millions: its number of parameters.
    reduced: what the small model sets otherwise.
    conditions: paths of its low-dimensional conditions, beside the timestep.
    extra: inputs that its config does not ask for, from the derived ones.
    """

    config: str
    millions: float
    reduced: dict[str, Any]
    conditions: tuple[str, ...] = ()
    extra: Callable[[nn.Module, Inputs, bool], Inputs] = field(default=lambda *_: {})


def control_residuals(unet: nn.Module, inputs: Inputs, full: bool) -> Inputs:
    """What a ControlNet of the same widths adds to the UNet's skips and middle."""
    parameter = next(unet.parameters())
    net = model("controlnet-sd15", full=full, dtype=parameter.dtype, device=parameter.device)
    height, width = inputs["sample"].shape[-2:]
    image = torch.ones(len(inputs["sample"]), 3, 8 * height, 8 * width).to(parameter)
    with torch.no_grad():
        down, middle = net(**inputs, controlnet_cond=image, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def text_mask(unet: nn.Module, inputs: Inputs, full: bool) -> Inputs:
    mask = torch.ones(inputs["encoder_hidden_states"].shape[:2], dtype=torch.int64)
    mask[:, 5:] = 0
    return {"encoder_attention_mask": mask.to(inputs["sample"].device)}


def adapter_scale(unet: nn.Module, inputs: Inputs, full: bool) -> Inputs:
    return {"cross_attention_kwargs": {"scale": 1.0}}


LATENT = {"norm_num_groups": 8, "layers_per_block": 1, "sample_size": 16}
SD15 = LATENT | {
    "attention_head_dim": 4,
    "block_out_channels": [16, 32, 64, 64],
    "cross_attention_dim": 32,
}
CONTROL = {key: value for key, value in SD15.items() if key != "sample_size"} | {
    "conditioning_embedding_out_channels": [4, 4, 8, 8]
}
PIXART = {
    "attention_head_dim": 24,
    "caption_channels": 32,
    "cross_attention_dim": 96,
    "num_attention_heads": 4,
    "num_layers": 2,
    "sample_size": 16,
}
SD3 = {
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "joint_attention_dim": 32,
    "num_attention_heads": 4,
    "num_layers": 3,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 24,
    "sample_size": 16,
}
FLUX = {
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "in_channels": 16,
    "joint_attention_dim": 32,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "pooled_projection_dim": 32,
}

ENTRIES: dict[str, Entry] = {
    "ddpm-cifar10": Entry(
        config="ddpm-cifar10",
        millions=35.7,
        reduced=LATENT | {"block_out_channels": [16, 32, 32, 32]},
    ),
    "ldm-vq": Entry(
        config="ldm-vq",
        millions=274.1,
        reduced=LATENT | {"attention_head_dim": 16, "block_out_channels": [16, 32, 48, 64]},
    ),
    "adm": Entry(
        config="adm",
        millions=295.9,
        reduced=LATENT
        | {
            "attention_head_dim": 16,
            "attn_norm_num_groups": 8,
            "block_out_channels": [16, 32, 48, 64],
            "num_class_embeds": 10,
        },
        conditions=("class_labels",),
    ),
    "sd15": Entry(config="sd15", millions=859.5, reduced=SD15),
    "sd15-inpainting": Entry(config="sd15-inpainting", millions=859.5, reduced=SD15),
    "sd15-controlled": Entry(config="sd15", millions=859.5, reduced=SD15, extra=control_residuals),
    "sd15-masked": Entry(config="sd15", millions=859.5, reduced=SD15, extra=text_mask),
    "sd15-scaled": Entry(config="sd15", millions=859.5, reduced=SD15, extra=adapter_scale),
    "sd15-distilled": Entry(
        config="sd15",
        millions=859.6,
        reduced=SD15 | {"time_cond_proj_dim": 16},
        conditions=("timestep_cond",),
    ),
    "sd21": Entry(
        config="sd21",
        millions=865.9,
        reduced=SD15 | {"attention_head_dim": [2, 4, 8, 8]},
    ),
    "sdxl": Entry(
        config="sdxl",
        millions=2567.5,
        reduced=LATENT
        | {
            "addition_time_embed_dim": 8,
            "attention_head_dim": [2, 4, 8],
            "block_out_channels": [16, 32, 64],
            "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 80,
            "transformer_layers_per_block": [1, 1, 2],
        },
        conditions=("added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"),
    ),
    "controlnet-sd15": Entry(config="controlnet-sd15", millions=361.3, reduced=CONTROL),
    "svd": Entry(
        config="svd",
        millions=1524.6,
        reduced={
            "addition_time_embed_dim": 8,
            "block_out_channels": [32, 32, 64, 64],
            "cross_attention_dim": 32,
            "layers_per_block": 1,
            "num_attention_heads": [2, 2, 4, 4],
            "num_frames": 3,
            "projection_class_embeddings_input_dim": 24,
            "sample_size": 16,
        },
        conditions=("added_time_ids",),
    ),
    "dit-xl-2": Entry(
        config="dit-xl-2",
        millions=749.8,
        reduced={
            "attention_head_dim": 24,
            "num_attention_heads": 4,
            "num_embeds_ada_norm": 10,
            "num_layers": 2,
            "sample_size": 16,
        },
        conditions=("class_labels",),
    ),
    "pixart-alpha": Entry(config="pixart-alpha", millions=610.9, reduced=PIXART),
    "pixart-alpha-1024": Entry(
        config="pixart-alpha-1024",
        millions=611.3,
        reduced=PIXART,
        conditions=("added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio"),
    ),
    "pixart-sigma": Entry(config="pixart-sigma", millions=610.9, reduced=PIXART),
    "sd3": Entry(config="sd3", millions=2028.3, reduced=SD3, conditions=("pooled_projections",)),
    "sd35-medium": Entry(
        config="sd35-medium",
        millions=2243.2,
        reduced=SD3 | {"dual_attention_layers": [0, 1]},
        conditions=("pooled_projections",),
    ),
    "flux-dev": Entry(
        config="flux-dev",
        millions=11901.4,
        reduced=FLUX,
        conditions=("pooled_projections", "guidance"),
    ),
    "flux-schnell": Entry(
        config="flux-schnell", millions=11891.2, reduced=FLUX, conditions=("pooled_projections",)
    ),
    "hunyuan-dit": Entry(
        config="hunyuan-dit",
        millions=1516.5,
        reduced={
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_layers": 6,
            "pooled_projection_dim": 32,
            "sample_size": 16,
            "text_len": 8,
            "text_len_t5": 12,
        },
        conditions=("image_meta_size",),  # the only legal style is 0
    ),
    "hunyuan-video": Entry(
        config="hunyuan-video",
        millions=12821.0,
        reduced={
            "attention_head_dim": 32,
            "in_channels": 4,
            "num_attention_heads": 2,
            "num_layers": 2,
            "num_single_layers": 2,
            "out_channels": 4,
            "pooled_projection_dim": 32,
            "rope_axes_dim": [8, 12, 12],
            "text_embed_dim": 32,
        },
        conditions=("pooled_projections", "guidance"),
    ),
    "wan-1.3b": Entry(
        config="wan-1.3b",
        millions=1419.0,
        reduced={
            "attention_head_dim": 32,
            "ffn_dim": 128,
            "freq_dim": 32,
            "in_channels": 4,
            "num_attention_heads": 3,
            "num_layers": 2,
            "out_channels": 4,
            "text_dim": 32,
        },
    ),
    "cogvideox-2b": Entry(
        config="cogvideox-2b",
        millions=1693.8,
        reduced={
            "attention_head_dim": 32,
            "in_channels": 4,
            "max_text_seq_length": 8,
            "num_attention_heads": 3,
            "num_layers": 2,
            "out_channels": 4,
            "sample_frames": 9,
            "sample_height": 8,
            "sample_width": 12,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
        },
    ),
    "qwen-image": Entry(
        config="qwen-image",
        millions=20430.4,
        reduced={
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "in_channels": 16,
            "joint_attention_dim": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "out_channels": 4,
        },
    ),
    "z-image": Entry(
        config="z-image",
        millions=6154.9,
        reduced={
            "axes_dims": [8, 12, 12],
            "axes_lens": [128, 64, 64],
            "cap_feat_dim": 32,
            "dim": 96,
            "in_channels": 4,
            "n_heads": 3,
            "n_kv_heads": 3,
            "n_layers": 2,
        },
    ),
}


def config(name: str, full: bool = False) -> dict[str, Any]:
    """The configuration of `name`, as published or reduced."""
    entry = ENTRIES[name]
    published: dict[str, Any] = json.loads((CONFIGS / f"{entry.config}.json").read_text())
    return published if full else published | entry.reduced


def model(
    name: str,
    *,
    full: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """`name` with random weights that depend on the configuration alone, ready to run.

    Parameters that diffusers initialises to zero get small values, so that no part is without
    effect.
    """
    import diffusers

    values = config(name, full)
    kind = getattr(diffusers, values.pop("_class_name"))
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                made: nn.Module = kind.from_config(values)
            return made.to(device="meta", dtype=dtype).eval()  # torch.Tensor([x]) stays on CPU
        made = kind.from_config(values)
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return made.to(device=device, dtype=dtype).eval()


def inputs(name: str, denoiser: nn.Module, batch: int = 2, scale: int = 1) -> Inputs:
    """Inputs of `denoiser`, which model(name) made; `scale` multiplies height and width."""
    entry = ENTRIES[name]
    derived = example_inputs(denoiser, batch, scale=scale)
    full = any(denoiser.config[key] != value for key, value in entry.reduced.items())
    return derived | entry.extra(denoiser, derived, full)


def at(values: Inputs, path: str) -> Tensor:
    """The input at a path of `Entry.conditions`."""
    found: Any = values
    for key in path.split("."):
        found = found[key]
    return found
