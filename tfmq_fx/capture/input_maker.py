"""Make tensors for a diffusers denoiser: sizes from its config, values from a seeded generator."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

TEXT_TOKENS = 16
CLIP_TOKENS = 77  # text tokens of models that are conditioned on CLIP
GRID = 16  # side in tokens of packed latents, side in pixels of latents whose config has no size
FRAMES = 3

CLIP_TEXT = ("UNet2DConditionModel", "ControlNetModel")
IMAGE_TOKENS = {"UNetSpatioTemporalConditionModel": 1}  # conditioned on an image, not on text


class Maker:
    """A source of one model's inputs: sizes from its config, values from one seeded generator."""

    def __init__(self, model: nn.Module, batch: int, scale: int) -> None:
        self.model, self.kind = model, type(model).__name__
        self.batch, self.scale = batch, scale
        self.names = list(inspect.signature(model.forward).parameters)
        self.config = getattr(model, "config", None)
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.dtype, self.device = parameter.dtype, parameter.device
        on_meta = self.device.type == "meta"
        self.generator = None if on_meta else torch.Generator(self.device).manual_seed(0)

    def get(self, *keys: str) -> Any:
        """The first of `keys` that the config sets, or None."""

        def read(key: str) -> Any:  # diffusers' loaders set attributes and not the entries
            value = getattr(self.config, key, None)
            entry = getattr(self.config, "get", None)
            return entry(key) if value is None and entry is not None else value

        return next((value for value in map(read, keys) if value is not None), None)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=self.generator)

    def features(self, key: str, *tokens: int) -> Tensor | None:
        """A normal tensor (batch, *tokens, width), where the config sets the width as `key`."""
        width = self.get(key)
        return self.normal(self.batch, *tokens, width) if width else None

    def integers(self, high: int) -> Tensor:
        """A tensor (batch,) of integers in [0, high)."""
        return torch.randint(high, (self.batch,), device=self.device, generator=self.generator)

    def full(self, value: float, dtype: torch.dtype | None) -> Tensor:
        return torch.full((self.batch,), value, dtype=dtype or self.dtype, device=self.device)

    def rows(self, *row: float) -> Tensor:
        """A tensor (batch, len(row)) with `row` for each sample, in the model's dtype."""
        return torch.tensor([row] * self.batch, dtype=self.dtype, device=self.device)

    def positions(self, *sides: int) -> Tensor:
        """The coordinates of a grid, (tokens, len(sides)), the last running fastest."""
        axes = [torch.arange(side, device=self.device) for side in sides]
        grid = torch.meshgrid(*axes, indexing="ij")
        return torch.stack(grid, dim=-1).flatten(0, -2).to(self.dtype)

    def size(self) -> tuple[int, int]:
        """The height and width of the latents, or of the token grid of packed latents."""
        size = self.get("sample_size")
        height, width = size if isinstance(size, (list, tuple)) else (size or GRID, size or GRID)
        height, width = self.get("sample_height") or height, self.get("sample_width") or width
        return self.scale * height, self.scale * width

    def pixels(self) -> tuple[float, float]:
        """The height and width of the image in pixels."""
        height, width = self.size()
        return 8.0 * height, 8.0 * width

    def frames(self) -> int:
        """The number of frames of a video's latents."""
        if self.get("sample_frames"):
            each = self.get("temporal_compression_ratio") or 1
            return int((self.get("sample_frames") - 1) // each + 1)
        patch = self.get("patch_size")
        each = self.get("patch_size_t") or (patch[0] if isinstance(patch, (list, tuple)) else 1)
        return int(FRAMES * each)

    def tokens(self) -> int:
        """The number of tokens in encoder_hidden_states."""
        usual = CLIP_TOKENS if self.kind in CLIP_TEXT else TEXT_TOKENS
        length = self.get("text_len", "max_text_seq_length", "max_sequence_length") or usual
        return IMAGE_TOKENS.get(self.kind, int(length))
