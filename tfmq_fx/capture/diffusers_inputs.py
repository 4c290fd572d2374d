"""Derive example inputs of a diffusers denoiser from its config and its forward's signature."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import ConfigError

from .input_maker import TEXT_TOKENS, Maker

# Facts that neither names nor config contain. Timesteps: value, dtype (None: the model's); models
# that are not listed take integers. Flow matching counts time from 0 to 1 or as floats to 1000; SVD
# takes log(sigma) / 4; HunyuanDiT computes its time embedding in the timestep's own dtype
# (diffusers 0.42).
TIMESTEPS: dict[str, tuple[float, torch.dtype | None]] = {
    "AuraFlowTransformer2DModel": (0.5, None),
    "BriaTransformer2DModel": (500.0, None),
    "ChromaTransformer2DModel": (0.5, None),
    "Flux2Transformer2DModel": (0.5, None),
    "FluxControlNetModel": (0.5, None),
    "FluxTransformer2DModel": (0.5, None),
    "HunyuanDiT2DModel": (500.0, None),
    "HunyuanVideoTransformer3DModel": (500.0, None),
    "HunyuanDiT2DControlNetModel": (500.0, None),
    "HunyuanImageTransformer2DModel": (500.0, None),
    "HunyuanVideo15Transformer3DModel": (500.0, torch.float32),
    "LTXVideoTransformer3DModel": (500.0, torch.float32),
    "LongCatImageTransformer2DModel": (0.5, None),
    "Lumina2Transformer2DModel": (0.5, None),
    "OvisImageTransformer2DModel": (0.5, None),
    "QwenImageControlNetModel": (0.5, None),
    "QwenImageTransformer2DModel": (0.5, None),
    "SD3ControlNetModel": (500.0, torch.float32),
    "SD3Transformer2DModel": (500.0, torch.float32),
    "SanaTransformer2DModel": (500.0, torch.float32),
    "UNetSpatioTemporalConditionModel": (0.5, torch.float32),
    "ZImageTransformer2DModel": (0.5, torch.float32),
}
FRAMES_FIRST = (  # (batch, frames, channels, ...), where other videos have channels first
    "CogVideoXTransformer3DModel",
    "ConsisIDTransformer3DModel",
    "UNetSpatioTemporalConditionModel",
)
UNPACKED = "HiDreamImageTransformer2DModel"  # has img_ids, and takes the latents as an image too


def latents(make: Maker) -> Tensor | None:
    """Latents as an image or a video, or packed as (batch, tokens, channels) for models that take
    the grid as another input."""
    channels = make.get("in_channels")
    if channels is None:
        return None
    height, width = make.size()
    packed = "img_ids" in make.names or "img_shapes" in make.names
    if packed and make.kind != UNPACKED:
        return make.normal(make.batch, height * width, channels)
    if {"num_frames", "height", "width"} <= set(make.names):
        return make.normal(make.batch, make.frames() * height * width, channels)
    if make.kind in FRAMES_FIRST:
        return make.normal(make.batch, make.frames(), channels, height, width)
    if "3D" in make.kind or make.get("motion_max_seq_length"):
        return make.normal(make.batch, channels, make.frames(), height, width)
    if "1D" in make.kind:
        return make.normal(make.batch, channels, height)
    return make.normal(make.batch, channels, height, width)


def image_list(make: Maker) -> list[Tensor] | None:
    """A list with a tensor (channels, 1 frame, height, width) for each sample."""
    channels = make.get("in_channels")
    if channels is None or "cap_feats" not in make.names:
        return None
    return [make.normal(channels, 1, *make.size()) for _ in range(make.batch)]


def text(make: Maker) -> Tensor | None:
    """Text features (batch, tokens, width)."""
    width = make.get("encoder_hid_dim") if make.get("encoder_hid_dim_type") else None
    width = width or make.get(
        "joint_attention_dim",
        "caption_channels",
        "text_embed_dim",
        "text_dim",
        "cap_feat_dim",
        "context_in_dim",
        "cross_attention_dim",
    )
    if isinstance(width, (list, tuple)):  # one for each block
        width = width[0]
    return make.normal(make.batch, make.tokens(), width) if width else None


def mask(make: Maker, tokens: int) -> Tensor:
    """A mask (batch, tokens) of int64: ones, then zeros over the last quarter."""
    row = torch.arange(tokens, device=make.device) < tokens - tokens // 4
    return row.to(torch.int64).expand(make.batch, tokens).clone()


def text_mask(make: Maker) -> Tensor | None:
    """A mask of the text tokens; None for the UNets, which pipelines call without one."""
    masked = make.get(
        "caption_channels", "text_embed_dim", "text_len", "joint_attention_dim", "cap_feat_dim"
    )
    return mask(make, make.tokens()) if masked else None


def class_labels(make: Maker) -> Tensor | None:
    """Class labels (batch,), or features (batch, width) that the model projects."""
    kind = make.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        return make.normal(make.batch, make.get("projection_class_embeddings_input_dim"))
    if kind == "timestep":
        return make.integers(1000)
    classes = make.get("num_class_embeds", "num_embeds_ada_norm")
    return make.integers(classes) if classes and kind is None else None


def token_ids(make: Maker) -> dict[str, Tensor]:
    """Positions of image tokens in time, height and width (further axes have size 1), and of text
    tokens, which are zeros."""
    axes = len(make.get("axes_dims_rope", "axes_dim") or (0, 0, 0))
    return {
        "img_ids": make.positions(1, *make.size(), *[1] * (axes - 3)),
        "txt_ids": torch.zeros(make.tokens(), axes, dtype=make.dtype, device=make.device),
    }


def adapter_images(make: Maker) -> list[Tensor]:
    """The image features of each IP-Adapter: (batch, 1 image, width), or (batch, 1 image, tokens,
    width) where it takes all tokens of CLIP."""
    features = []
    for layer in make.model.encoder_hid_proj.image_projection_layers:  # type: ignore[union-attr]
        linear = next(part for part in layer.modules() if isinstance(part, nn.Linear))
        tokens = () if type(layer).__name__ == "ImageProjection" else (257,)
        features.append(make.normal(make.batch, 1, *tokens, linear.in_features))
    return features


def added_conditions(make: Maker) -> dict[str, Any] | None:
    """The added_cond_kwargs of SDXL (sizes, pooled text), Kandinsky (image), IP-Adapters or
    PixArt-alpha."""
    kind = make.get("addition_embed_type")
    height, width = make.pixels()
    if kind == "text_time":
        joined = make.get("projection_class_embeddings_input_dim")
        each = make.get("addition_time_embed_dim")
        added: dict[str, Any] = {
            "text_embeds": make.normal(make.batch, joined - 6 * each),
            "time_ids": make.rows(height, width, 0.0, 0.0, height, width),
        }
        if make.get("encoder_hid_dim_type") == "ip_image_proj":
            added["image_embeds"] = adapter_images(make)
        return added
    if kind == "image":
        return {"image_embeds": make.normal(make.batch, make.get("encoder_hid_dim"))}
    if make.get("encoder_hid_dim_type") == "ip_image_proj":
        return {"image_embeds": adapter_images(make)}
    additional = make.get("use_additional_conditions")
    if additional is None:  # PixArt-alpha decides by its size then
        additional = make.kind == "PixArtTransformer2DModel" and make.get("sample_size") == 128
    if additional:
        return {"resolution": make.rows(height, width), "aspect_ratio": make.rows(1.0)}
    return None


def time_ids(make: Maker) -> Tensor | None:
    """The frames per second, motion and noise of a video."""
    joined = make.get("projection_class_embeddings_input_dim")
    each = make.get("addition_time_embed_dim")
    return make.rows(*(6.0, 127.0, 0.02)[: joined // each]) if joined and each else None


def rotary(make: Maker) -> tuple[Tensor, Tensor] | None:
    """The cosines and sines (tokens, head width) of angles of positions, each angle twice."""
    patch, width = make.get("patch_size"), make.get("attention_head_dim")
    used = make.get("use_rotary_positional_embeddings")
    if used is None:
        used = not make.get("sample_frames")  # videos have other forms of it
    if not used or not patch or not width:
        return None
    tokens = math.prod(side // patch for side in make.size())
    if make.get("sample_frames"):
        tokens *= -(-make.frames() // (make.get("patch_size_t") or 1))
    rates = 10000.0 ** -(
        torch.arange(width // 2, dtype=torch.float32, device=make.device) / (width // 2)
    )
    angles = torch.arange(tokens, device=make.device)[:, None] * rates[None]
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def control_image(make: Maker) -> Tensor | None:
    """A ControlNet's image: pixels where the model's own convolutions shrink it, else latents."""
    channels = make.get("conditioning_channels")
    steps = make.get("conditioning_embedding_out_channels")
    if not channels or not steps:
        return latents(make)
    height, width = (side * 2 ** (len(steps) - 1) for side in make.size())
    return make.normal(make.batch, channels, height, width)


def second_text(make: Maker) -> Tensor | None:
    """The features of T5 for models that project those of two text encoders."""
    widths = make.get("caption_channels")
    if make.get("llama_layers") and widths:
        return make.normal(make.batch, TEXT_TOKENS, widths[0])
    return make.features("cross_attention_dim_t5", make.get("text_len_t5"))


def layered_text(make: Maker) -> Tensor | None:
    """The features of each of the layers of Llama that the model reads."""
    layers, widths = make.get("llama_layers"), make.get("caption_channels")
    if not layers or not widths:
        return None
    return make.normal(max(layers) + 1, make.batch, TEXT_TOKENS, widths[1])


def patches(make: Maker) -> int:
    """The number of patches of an image."""
    patch = make.get("patch_size") or 1
    return math.prod(side // patch for side in make.size())


def sequence(make: Maker) -> int | None:
    """The length of text, timestep and image as one sequence (OmniGen)."""
    return TEXT_TOKENS + 1 + patches(make) if make.get("vocab_size") else None


def token_numbers(make: Maker, key: str, tokens: int) -> Tensor | None:
    """Numbers (batch, tokens) of tokens of a vocabulary whose size the config sets as `key`."""
    high = make.get(key)
    if not high:
        return None
    shape = (make.batch, tokens)
    return torch.randint(high, shape, device=make.device, generator=make.generator)


def joint_mask(make: Maker) -> Tensor | None:
    """A mask (batch, length, length) of ones over a joint sequence."""
    length = sequence(make)
    return None if length is None else make.normal(make.batch, length, length) * 0 + 1


def joint_positions(make: Maker) -> Tensor | None:
    """The positions (batch, length) in a joint sequence."""
    length = sequence(make)
    if length is None:
        return None
    return torch.arange(length, device=make.device).expand(make.batch, length).clone()


STYLE = "use_style_cond_and_image_meta_size"  # config key of HunyuanDiT
RULES: dict[str, Callable[[Maker], Any]] = {
    # only the configs of UNets and ControlNets have a size
    "sample": lambda make: make.get("sample_size", "conditioning_channels") and latents(make),
    "hidden_states": latents,
    "x": image_list,
    **dict.fromkeys(
        ("timestep", "timesteps", "t"),
        lambda make: make.full(*TIMESTEPS.get(make.kind, (1, torch.int64))),
    ),
    "encoder_hidden_states": text,
    "encoder_hidden_states_t5": second_text,
    "encoder_hidden_states_llama3": layered_text,
    "encoder_hidden_states_2": lambda make: make.features("text_embed_2_dim", TEXT_TOKENS),
    "encoder_attention_mask_2": lambda make: (
        mask(make, TEXT_TOKENS) if make.get("text_embed_2_dim") else None
    ),
    "image_embeds": lambda make: (
        make.get("image_embed_dim")
        and make.normal(make.batch, 1, make.get("image_embed_dim")) * 0  # zeros: no image
    ),
    "pooled_embeds": lambda make: make.features("text_emb_dim"),
    "input_ids": lambda make: sequence(make) and token_numbers(make, "vocab_size", TEXT_TOKENS),
    "input_img_latents": lambda make: [],
    "input_image_sizes": lambda make: {},
    "attention_mask": joint_mask,
    "position_ids": joint_positions,
    "prior_token_id": lambda make: token_numbers(
        make, "prior_vq_quantizer_codebook_size", patches(make)
    ),
    "prior_token_drop": lambda make: torch.zeros(
        make.batch, patches(make), dtype=torch.bool, device=make.device
    ),
    "encoder_hidden_states_image": lambda make: make.features("image_dim", 257),  # tokens of CLIP
    "cap_feats": lambda make: (
        make.get("cap_feat_dim")
        and [make.normal(TEXT_TOKENS, make.get("cap_feat_dim")) for _ in range(make.batch)]
    ),
    **dict.fromkeys(
        ("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask"), text_mask
    ),
    "text_embedding_mask_t5": lambda make: (
        make.get("text_len_t5") and mask(make, make.get("text_len_t5"))
    ),
    "class_labels": class_labels,
    "pooled_projections": lambda make: make.features("pooled_projection_dim"),
    "guidance": lambda make: make.full(3.5, torch.float32) if make.get("guidance_embeds") else None,
    "timestep_cond": lambda make: make.features("time_cond_proj_dim"),
    "img_ids": lambda make: None if make.kind == UNPACKED else token_ids(make)["img_ids"],
    "txt_ids": lambda make: token_ids(make)["txt_ids"],
    "img_shapes": lambda make: [[(1, *make.size())]] * make.batch,
    "txt_seq_lens": lambda make: [make.tokens()] * make.batch,
    "added_cond_kwargs": added_conditions,
    "added_time_ids": time_ids,
    **dict.fromkeys(("original_size", "target_size"), lambda make: make.rows(*make.pixels())),
    "crop_coords": lambda make: make.rows(0.0, 0.0),
    "num_frames": Maker.frames,
    "height": lambda make: make.size()[0],
    "width": lambda make: make.size()[1],
    "image_meta_size": lambda make: (
        make.rows(*make.pixels(), *make.pixels(), 0.0, 0.0) if make.get(STYLE) else None
    ),
    "style": lambda make: make.full(0, torch.int64) if make.get(STYLE) else None,
    "image_rotary_emb": rotary,
    "controlnet_cond": control_image,
}


def example_inputs(model: nn.Module, batch: int = 2, *, scale: int = 1) -> dict[str, Any]:
    """Inputs for a denoiser of diffusers, by parameter name.

    `scale` multiplies height and width. Optional inputs that the config does not require are left
    out. The values depend on the model's class, config, dtype and device alone. Raises ConfigError
    naming the parameters that cannot be derived, and the call that gives them.
    """
    make = Maker(model, batch, scale)
    inputs: dict[str, Any] = {}
    missing: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = RULES[name](make) if name in RULES else None
        if value is not None:
            inputs[name] = value
        elif parameter.default is parameter.empty:
            missing.append(name)
    if missing:
        needed = ", ".join(f"{name!r}: ..." for name in names_of(model))
        raise ConfigError(
            f"example_inputs cannot be derived for {make.kind}: neither its config nor a rule says "
            f"what {' and '.join(map(repr, missing))} {'is' if len(missing) == 1 else 'are'}. Pass "
            f'example_inputs=: inputs = tfmq_fx.record_inputs(pipe, "a prompt"); '
            f"tfmq_fx.prepare(model, inputs); or prepare(model, {{{needed}}})"
        )
    return inputs


def names_of(model: nn.Module) -> list[str]:
    """The names of the parameters of forward that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]
