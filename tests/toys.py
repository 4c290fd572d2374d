"""Small models for tests: denoisers of the usual kinds, and models that lay traps for a tracer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def seeded(make: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """make(*args, **kwargs) with weights that depend on the seed alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make(*args, **kwargs)


def sinusoidal(t: Tensor, width: int) -> Tensor:
    """(batch,) -> (batch, width): cosines and sines of t at geometric frequencies."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * rates[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, plus the time projection, twice, with a skip."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.norm2 = nn.GroupNorm(4, out)
        self.drop = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h += self.time(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.drop(F.silu(self.norm2(h))))
        return h + self.skip(x)


class Attention(nn.Module):
    """Self-attention over pixels, written with einsum and softmax."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3 * c, h * w).chunk(3, dim=1)
        weights = (torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(c)).softmax(dim=-1)
        return x + self.out(torch.einsum("bnm,bcm->bcn", weights, v).reshape(b, c, h, w))


class ToyUNet(nn.Module):
    """A DDPM UNet with nothing from diffusers: three levels, attention in the middle."""

    def __init__(self, width: int = 16, channels: int = 3, embed: int = 32) -> None:
        super().__init__()
        self.embed = embed
        self.time_mlp = nn.Sequential(nn.Linear(embed, 64), nn.SiLU(), nn.Linear(64, 64))
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down1 = ResBlock(width, width, 64)
        self.shrink1 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2 = ResBlock(width, 2 * width, 64)
        self.shrink2 = nn.AvgPool2d(2)
        self.mid1 = ResBlock(2 * width, 2 * width, 64)
        self.attention = Attention(2 * width)
        self.mid2 = ResBlock(2 * width, 2 * width, 64)
        self.up2 = ResBlock(4 * width, width, 64)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.up1 = ResBlock(2 * width, width, 64)
        self.norm_out = nn.GroupNorm(4, width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.tensor([t], device=x.device)
        t = t.reshape(-1).expand(x.shape[0])
        temb = self.time_mlp(sinusoidal(t, self.embed))
        a = self.down1(self.conv_in(x), temb)
        b = self.down2(self.shrink1(a), temb)
        h = self.mid2(self.attention(self.mid1(self.shrink2(b), temb)), temb)
        h = F.interpolate(h, size=b.shape[-2:], mode="nearest")
        h = self.up2(torch.cat([h, b], dim=1), temb)
        h = self.smooth(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.up1(torch.cat([h, a], dim=1), temb)
        return self.conv_out(F.silu(self.norm_out(h)))


class DiTBlock(nn.Module):
    """adaLN-zero: shift, scale and gate of both halves from the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, m1, g1, s2, m2, g2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + m1) + s1
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(h).chunk(3, dim=-1)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + g1 * self.proj(h)
        return x + g2 * self.mlp(self.norm2(x) * (1 + m2) + s2)


class ToyDiT(nn.Module):
    """A class-conditional transformer on 2x2 patches."""

    def __init__(
        self, width: int = 32, depth: int = 2, classes: int = 10, size: int = 8, channels: int = 3
    ) -> None:
        super().__init__()
        self.width, self.channels = width, channels
        self.patch = nn.Conv2d(channels, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, (size // 2) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(DiTBlock(width, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        b, _, height, width = x.shape
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        c = self.time(sinusoidal(t, self.width)) + self.label(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        out = self.head(self.norm(tokens))
        out = out.view(b, height // 2, width // 2, 2, 2, self.channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(b, self.channels, height, width)


def tiny_unet2d(**options: Any) -> nn.Module:
    """diffusers' UNet2DModel with attention, about 0.3M parameters, 16x16; options: instead."""
    from diffusers import UNet2DModel

    usual: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    }
    model: nn.Module = seeded(UNet2DModel, **usual | options)
    return model.eval()


def cifar10_unet(divide: int = 8) -> nn.Module:
    """google/ddpm-cifar10-32's configuration, its widths divided."""
    from diffusers import UNet2DModel

    model: nn.Module = seeded(
        UNet2DModel,
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=tuple(width // divide for width in (128, 256, 256, 256)),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=32 if divide == 1 else 8,
    )
    return model.eval()


class Small(nn.Module):
    """Base of the traps: x (batch, 4) and t (batch,) through one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def base(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x) + t[:, None].float() * 0.01


class BranchesOnData(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.base(x, t)
        return -self.base(x, t)


class ReadsItem(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.base(x, t) * float(t[0].item())


class BranchesOnBatch(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return -self.base(x, t)
        return self.base(x, t)


class LoopsOverBatch(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = self.base(x, t)
        return torch.stack([rows[i] * (i + 1) for i in range(x.shape[0])])


class WritesItems(Small):
    """Rotary-like item writes, and in-place operators of which one is seen through a view."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.base(x, t)
        out = torch.empty_like(h)
        out[..., 0::2] = -h[..., 1::2]
        out[..., 1::2] = h[..., 0::2]
        left = out[:, :2]
        left += 1.0
        left.mul_(2.0)
        out -= h
        return out


class WritesState(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x, t) + self.calls


class InPlaceActivations(Small):
    """In-place activations: one whose input is read again, two whose input is not."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.free = nn.ReLU(inplace=True), nn.SiLU(inplace=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.base(x, t)
        y = self.act(h)
        return self.free(y + h) + F.relu(h * 2, inplace=True)


class SlicesSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.layers[:2](x) + t[:, None].float()
        return self.layers[2:](h)


class Autocasts(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.base(x, t).float()


class ExpandsTimestep(Small):
    """As diffusers' UNets do: numbers become tensors, and 0-d tensors are spread over the batch."""

    def forward(self, x: Tensor, t: Tensor | float | int) -> Tensor:
        if not torch.is_tensor(t):
            t = torch.tensor([t], dtype=torch.long, device=x.device)
        elif t.ndim == 0:
            t = t[None].to(x.device)
        return self.base(x, t * torch.ones(x.shape[0], dtype=t.dtype, device=t.device))


class DropsOut(Small):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.dropout(self.drop(self.base(x, t)), 0.5, self.training)


class DrawsNoise(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device)
        return self.base(x, t) + 0.1 * noise + 0.1 * torch.rand_like(x)


class NestedOutput(Small):
    """A dict in and a dict out."""

    def forward(
        self, x: Tensor, t: Tensor, extra: dict[str, Any] | None = None, scale: float = 1.0
    ) -> dict[str, Any]:
        h = self.base(x, t) * scale
        if extra is not None:
            h = h + extra["shift"] + sum(extra["more"])
        return {"sample": h, "aux": {"norm": h.norm(dim=-1), "parts": [h, -h]}, "kind": "toy"}


class TupleOutput(Small):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = self.base(x, t)
        values, _ = torch.max(h, dim=-1)
        return h, values


class SharedTwice(Small):
    """One layer called twice, and registered under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.linear

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.alias(torch.tanh(self.linear(self.base(x, t))))


class CountsCalls(Small):
    """Its result hangs on Python state that no trace sees."""

    count = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        CountsCalls.count += 1
        return self.base(x, t) * CountsCalls.count
