"""Example inputs of a diffusers denoiser, derived from its config and its forward's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import ConfigError

TEXT_TOKENS = 16
CLIP_TOKENS = 77  # what pipelines give the models that are conditioned on CLIP's text
GRID = 16  # side in tokens of packed latents, side in pixels of latents whose config has no size
FRAMES = 3

# What neither names nor config tell. Timesteps: value, dtype (None: the model's); the rest take
# integers. Flow matching counts time from 0 to 1 or as floats to 1000; SVD takes log(sigma) / 4;
# HunyuanDiT computes its time embedding in the timestep's own dtype (diffusers 0.42).
TIMESTEPS: dict[str, tuple[float, torch.dtype | None]] = {
    "AuraFlowTransformer2DModel": (0.5, None),
    "BriaTransformer2DModel": (500.0, None),
    "ChromaTransformer2DModel": (0.5, None),
    "Flux2Transformer2DModel": (0.5, None),
    "FluxControlNetModel": (0.5, None),
    "FluxTransformer2DModel": (0.5, None),
    "HunyuanDiT2DModel": (500.0, None),
    "HunyuanVideoTransformer3DModel": (500.0, None),
    "LTXVideoTransformer3DModel": (500.0, torch.float32),
    "LongCatImageTransformer2DModel": (0.5, None),
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
CLIP_TEXT = ("UNet2DConditionModel", "ControlNetModel")
IMAGE_TOKENS = {"UNetSpatioTemporalConditionModel": 1}  # conditioned on an image, not on text


class Maker:
    """Draws the inputs of one model: sizes from its config, values from one seeded generator."""

    def __init__(self, model: nn.Module, batch: int, scale: int) -> None:
        self.kind = type(model).__name__
        self.batch, self.scale = batch, scale
        self.names = list(inspect.signature(model.forward).parameters)
        self.config = getattr(model, "config", None)
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.dtype, self.device = parameter.dtype, parameter.device
        on_meta = self.device.type == "meta"
        self.generator = None if on_meta else torch.Generator(self.device).manual_seed(0)

    def get(self, *keys: str) -> Any:
        """The first of `keys` that the config sets, or None."""
        read = getattr(self.config, "get", None) or (lambda key: getattr(self.config, key, None))
        return next((value for value in map(read, keys) if value is not None), None)

    def first(self, *keys: str) -> Any:
        """As `get`, for what some configs give per block or per axis."""
        found = self.get(*keys)
        return found[0] if isinstance(found, (list, tuple)) else found

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=self.generator)

    def integers(self, high: int) -> Tensor:
        """(batch,) of integers in [0, high)."""
        return torch.randint(high, (self.batch,), device=self.device, generator=self.generator)

    def full(self, value: float, dtype: torch.dtype | None) -> Tensor:
        return torch.full((self.batch,), value, dtype=dtype or self.dtype, device=self.device)

    def rows(self, *row: float) -> Tensor:
        """(batch, len(row)): `row` for each sample, in the model's dtype."""
        return torch.tensor([row] * self.batch, dtype=self.dtype, device=self.device)

    def positions(self, *sides: int) -> Tensor:
        """(tokens, len(sides)): the coordinates of a grid, the last running fastest."""
        axes = [torch.arange(side, device=self.device) for side in sides]
        grid = torch.meshgrid(*axes, indexing="ij")
        return torch.stack(grid, dim=-1).flatten(0, -2).to(self.dtype)

    def size(self) -> tuple[int, int]:
        """Height and width of the latents, or of the token grid of packed ones."""
        size = self.get("sample_size")
        height, width = size if isinstance(size, (list, tuple)) else (size or GRID, size or GRID)
        height, width = self.get("sample_height") or height, self.get("sample_width") or width
        return self.scale * height, self.scale * width

    def frames(self) -> int:
        """Number of frames of a video's latents."""
        if self.get("sample_frames"):
            each = self.get("temporal_compression_ratio") or 1
            return int((self.get("sample_frames") - 1) // each + 1)
        patch = self.get("patch_size")
        each = self.get("patch_size_t") or (patch[0] if isinstance(patch, (list, tuple)) else 1)
        return int(FRAMES * each)

    def tokens(self) -> int:
        """Number of tokens in encoder_hidden_states."""
        usual = CLIP_TOKENS if self.kind in CLIP_TEXT else TEXT_TOKENS
        length = self.get("text_len", "max_text_seq_length") or usual
        return IMAGE_TOKENS.get(self.kind, int(length))


def latents(make: Maker) -> Tensor | None:
    """Packed (batch, tokens, channels) beside what tells their grid, else an image or a video."""
    channels = make.get("in_channels")
    if channels is None:
        return None
    height, width = make.size()
    if "img_ids" in make.names or "img_shapes" in make.names:
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


def sample(make: Maker) -> Tensor | None:
    """Latents of a UNet; a config without size is a sign of a model that is none."""
    sized = make.get("sample_size") or make.get("conditioning_channels")
    return latents(make) if sized else None


def image_list(make: Maker) -> list[Tensor] | None:
    """One (channels, 1 frame, height, width) for each sample."""
    channels = make.get("in_channels")
    if channels is None or "cap_feats" not in make.names:
        return None
    return [make.normal(channels, 1, *make.size()) for _ in range(make.batch)]


def timestep(make: Maker) -> Tensor:
    value, dtype = TIMESTEPS.get(make.kind, (1, torch.int64))
    return make.full(value, dtype)


def text(make: Maker) -> Tensor | None:
    projected = make.get("encoder_hid_dim") if make.get("encoder_hid_dim_type") else None
    width = projected or make.first(
        "joint_attention_dim",
        "caption_channels",
        "text_embed_dim",
        "text_dim",
        "cap_feat_dim",
        "cross_attention_dim",
    )
    return make.normal(make.batch, make.tokens(), width) if width else None


def image_features(make: Maker) -> Tensor | None:
    """What CLIP gives for one image: 257 tokens."""
    width = make.get("image_dim")
    return make.normal(make.batch, 257, width) if width else None


def text_t5(make: Maker) -> Tensor | None:
    width = make.get("cross_attention_dim_t5")
    return make.normal(make.batch, make.get("text_len_t5"), width) if width else None


def text_list(make: Maker) -> list[Tensor] | None:
    width = make.get("cap_feat_dim")
    return [make.normal(TEXT_TOKENS, width) for _ in range(make.batch)] if width else None


def mask(make: Maker, tokens: int) -> Tensor:
    """(batch, tokens) of int64: ones, then zeros over the last quarter."""
    row = torch.arange(tokens, device=make.device) < tokens - tokens // 4
    return row.to(torch.int64).expand(make.batch, tokens).clone()


def text_mask(make: Maker) -> Tensor | None:
    """None for the UNets, which pipelines call without."""
    masked = make.get(
        "caption_channels", "text_embed_dim", "text_len", "joint_attention_dim", "cap_feat_dim"
    )
    return mask(make, make.tokens()) if masked else None


def text_mask_t5(make: Maker) -> Tensor | None:
    return mask(make, make.get("text_len_t5")) if make.get("text_len_t5") else None


def class_labels(make: Maker) -> Tensor | None:
    kind = make.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        return make.normal(make.batch, make.get("projection_class_embeddings_input_dim"))
    if kind == "timestep":
        return make.integers(1000)
    classes = make.get("num_class_embeds", "num_embeds_ada_norm")
    return make.integers(classes) if classes and kind is None else None


def pooled(make: Maker) -> Tensor | None:
    width = make.get("pooled_projection_dim")
    return make.normal(make.batch, width) if width else None


def guidance(make: Maker) -> Tensor | None:
    return make.full(3.5, torch.float32) if make.get("guidance_embeds") else None


def guidance_embedding(make: Maker) -> Tensor | None:
    width = make.get("time_cond_proj_dim")
    return make.normal(make.batch, width) if width else None


def image_ids(make: Maker) -> Tensor:
    """Positions in time, height and width; models with more axes have one layer there."""
    axes = len(make.get("axes_dims_rope", "axes_dim") or (0, 0, 0))
    return make.positions(1, *make.size(), *[1] * (axes - 3))


def text_ids(make: Maker) -> Tensor:
    axes = len(make.get("axes_dims_rope", "axes_dim") or (0, 0, 0))
    return torch.zeros(make.tokens(), axes, dtype=make.dtype, device=make.device)


def image_shapes(make: Maker) -> list[list[tuple[int, int, int]]]:
    return [[(1, *make.size())]] * make.batch


def text_lengths(make: Maker) -> list[int]:
    return [make.tokens()] * make.batch


def added_conditions(make: Maker) -> dict[str, Tensor] | None:
    """SDXL's sizes and pooled text, Kandinsky's image, or PixArt-alpha's resolution."""
    kind = make.get("addition_embed_type")
    height, width = (8.0 * side for side in make.size())
    if kind == "text_time":
        joined = make.get("projection_class_embeddings_input_dim")
        each = make.get("addition_time_embed_dim")
        return {
            "text_embeds": make.normal(make.batch, joined - 6 * each),
            "time_ids": make.rows(height, width, 0.0, 0.0, height, width),
        }
    if kind == "image":
        return {"image_embeds": make.normal(make.batch, make.get("encoder_hid_dim"))}
    additional = make.get("use_additional_conditions")
    if additional is None:  # PixArt-alpha decides by its size then
        additional = make.kind == "PixArtTransformer2DModel" and make.get("sample_size") == 128
    if additional:
        return {"resolution": make.rows(height, width), "aspect_ratio": make.rows(1.0)}
    return None


def time_ids(make: Maker) -> Tensor | None:
    """Frames per second, motion and noise of a video."""
    joined = make.get("projection_class_embeddings_input_dim")
    each = make.get("addition_time_embed_dim")
    return make.rows(*(6.0, 127.0, 0.02)[: joined // each]) if joined and each else None


def pixel_size(make: Maker) -> Tensor:
    height, width = (8.0 * side for side in make.size())
    return make.rows(height, width)


def corner(make: Maker) -> Tensor:
    return make.rows(0.0, 0.0)


def image_meta_size(make: Maker) -> Tensor | None:
    height, width = (8.0 * side for side in make.size())
    row = (height, width, height, width, 0.0, 0.0)
    return make.rows(*row) if make.get("use_style_cond_and_image_meta_size") else None


def style(make: Maker) -> Tensor | None:
    return make.full(0, torch.int64) if make.get("use_style_cond_and_image_meta_size") else None


def rotary(make: Maker) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines (tokens, head width) of angles of positions, each angle twice."""
    patch, width = make.get("patch_size"), make.get("attention_head_dim")
    used = make.get("use_rotary_positional_embeddings")
    if used is None:
        used = not make.get("sample_frames")  # videos have other forms of it
    if not used or not patch or not width:
        return None
    tokens = 1
    for side in make.size():
        tokens *= side // patch
    if make.get("sample_frames"):
        tokens *= -(-make.frames() // (make.get("patch_size_t") or 1))
    rates = 10000.0 ** -(
        torch.arange(width // 2, dtype=torch.float32, device=make.device) / (width // 2)
    )
    angles = torch.arange(tokens, device=make.device)[:, None] * rates[None]
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def control_image(make: Maker) -> Tensor | None:
    """An image in pixels where the model's own convolutions shrink it to the latents' size."""
    channels = make.get("conditioning_channels")
    steps = make.get("conditioning_embedding_out_channels")
    if not channels or not steps:
        return latents(make)
    height, width = (side * 2 ** (len(steps) - 1) for side in make.size())
    return make.normal(make.batch, channels, height, width)


RULES: dict[str, Callable[[Maker], Any]] = {
    "sample": sample,
    "hidden_states": latents,
    "x": image_list,
    "timestep": timestep,
    "t": timestep,
    "encoder_hidden_states": text,
    "encoder_hidden_states_t5": text_t5,
    "encoder_hidden_states_image": image_features,
    "cap_feats": text_list,
    "encoder_attention_mask": text_mask,
    "encoder_hidden_states_mask": text_mask,
    "text_embedding_mask": text_mask,
    "text_embedding_mask_t5": text_mask_t5,
    "class_labels": class_labels,
    "pooled_projections": pooled,
    "guidance": guidance,
    "timestep_cond": guidance_embedding,
    "img_ids": image_ids,
    "txt_ids": text_ids,
    "img_shapes": image_shapes,
    "txt_seq_lens": text_lengths,
    "added_cond_kwargs": added_conditions,
    "added_time_ids": time_ids,
    "original_size": pixel_size,
    "target_size": pixel_size,
    "crop_coords": corner,
    "num_frames": Maker.frames,
    "height": lambda make: make.size()[0],
    "width": lambda make: make.size()[1],
    "image_meta_size": image_meta_size,
    "style": style,
    "image_rotary_emb": rotary,
    "controlnet_cond": control_image,
}


def example_inputs(model: nn.Module, batch: int = 2, *, scale: int = 1) -> dict[str, Any]:
    """Inputs that `model`, a denoiser of diffusers, accepts, by parameter name.

    `scale` multiplies height and width. Optional inputs that the config does not ask for are left
    out. The values depend on the model's class, config, dtype and device alone. Raises ConfigError
    naming the parameter that cannot be derived.
    """
    make = Maker(model, batch, scale)
    inputs: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = RULES[name](make) if name in RULES else None
        if value is not None:
            inputs[name] = value
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"example_inputs cannot be derived for {make.kind}: neither its config nor a rule "
                f"says what {name!r} is. Pass example_inputs=({name}, ...) to prepare()."
            )
    return inputs
