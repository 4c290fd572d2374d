"""Random small denoisers for property tests, each built from a spec that prints as its own code.

build(Spec(...)) gives the nn.Module of a failing example; its body is a tree of ingredients, each a
few lines of what people write in denoisers. `TRAPS` are those that a graph cannot hold: a model
with one is to be refused, or followed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import einops
import numpy as np
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

EMBED, HEADS, OPTIONS = 8, 2, 4
INTEGERS, FLOATS = (0, 3, 500, 999), (0.0, 0.25, 3.5, 999.0)


@dataclass(frozen=True)
class Block:
    """One ingredient; option chooses among its variants, inner are the blocks inside it."""

    kind: str
    option: int = 0
    inner: tuple[Block, ...] = ()

    def __repr__(self) -> str:
        inner = f", {self.inner!r}" if self.inner else ""
        return f"Block({self.kind!r}, {self.option}{inner})"

    def kinds(self) -> Iterator[str]:
        """The kinds in this tree."""
        yield self.kind
        for block in self.inner:
            yield from block.kinds()


@dataclass(frozen=True)
class Spec:
    """A denoiser. layout: images (B, width, side, side) or tokens (B, side, width).

    condition: none, optional (y is None), class (labels) or nested (a dict of tensors).
    """

    layout: str
    width: int
    side: int
    time: str
    floats: bool
    spread: int
    condition: str
    body: tuple[Block, ...]
    output: str
    training: bool = False

    @property
    def traps(self) -> set[str]:
        """The ingredients that a graph cannot hold."""
        return {kind for block in self.body for kind in block.kinds() if kind in TRAPS}


Ingredient = Callable[["Cell", Tensor, dict[str, Any]], Tensor]
TOKENS: dict[str, Ingredient] = {}  # take (B, N, C)
IMAGES: dict[str, Ingredient] = {}  # take (B, C, H, W)
ANY: dict[str, Ingredient] = {}  # take both
WRAPPERS: dict[str, Ingredient] = {}  # take both, and have other ingredients inside
TRAPS: dict[str, Ingredient] = {}


def ingredient(table: dict[str, Ingredient]) -> Callable[[Ingredient], Ingredient]:
    def add(function: Ingredient) -> Ingredient:
        table[function.__name__] = function
        return function

    return add


class Cell(nn.Module):
    """One ingredient, with layers at hand of which it uses what it wants."""

    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.kind, self.option, self.width = block.kind, block.option, width
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.wide, self.cond = nn.Linear(width, 3 * width), nn.Linear(EMBED, 2 * width)
        self.conv = nn.Conv2d(
            width, width, 3, padding=1, padding_mode=("zeros", "circular")[self.option % 2]
        )
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, width) * 0.3),
            nn.Parameter(torch.randn(width)),
        )
        self.register_buffer("table", torch.randn(16, width))
        self.register_buffer("volatile", torch.linspace(0.5, 1, width), persistent=False)
        self.act = (nn.SiLU(), nn.ReLU(inplace=True), nn.GELU("tanh"), nn.SiLU(inplace=True))[
            self.option
        ]
        self.norm, self.group = nn.LayerNorm(width), nn.GroupNorm(2, width)
        self.drop = nn.Dropout(0.5)
        self.parts = nn.ModuleList(Cell(inner, width) for inner in block.inner)
        if self.kind == "batch_norm":
            self.batch = nn.BatchNorm2d(width)
        elif self.kind == "multihead":
            self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        elif self.kind == "sequential":
            self.layers = nn.Sequential(
                nn.Linear(width, 8), self.act, nn.Linear(8, width), nn.Tanh()
            )
        elif self.kind == "by_name":
            self.named = nn.ModuleDict({f"part{i}": part for i, part in enumerate(self.parts)})
        elif self.kind == "unet":
            self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
            self.merge = nn.Conv2d(2 * width, width, 1)
        elif self.kind == "tied":
            self.second.weight = self.first.weight
        elif self.kind == "alias":
            self.again = self.first
        elif self.kind == "einops_layer":
            self.fold, self.unfold = (
                Rearrange("b n (g c) -> b g n c", g=2),
                Rearrange("b g n c -> b n (g c)"),
            )

    def forward(self, h: Tensor, c: dict[str, Any]) -> Tensor:
        return EVERY[self.kind](self, h, c)

    def over(self, value: Tensor, h: Tensor) -> Tensor:
        """(B, C) or (C,) -> broadcastable to h."""
        if h.ndim == 3:
            return value[:, None] if value.ndim == 2 else value
        return value[..., None, None]

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.option}"


# ---------------------------------------------------------------------------- wrappers


@ingredient(WRAPPERS)
def residual(m, h, c):
    if m.option == 0:
        return h + m.parts[0](h, c)
    if m.option == 1:
        out = m.parts[0](h, c).clone()
        out += h
        return out
    return torch.add(m.parts[0](h, c=c), h, alpha=0.5)


@ingredient(WRAPPERS)
def twice(m, h, c):
    return m.parts[0](torch.tanh(m.parts[0](h, c)), c)


@ingredient(WRAPPERS)
def loop(m, h, c):
    for i in range(m.option):
        h = h * 0.5 + m.parts[i % len(m.parts)](h, c)
    return h


@ingredient(WRAPPERS)
def by_name(m, h, c):
    for name, part in m.named.items():
        h = part(h, c) if name != "part1" else h + part(h, c)
    return m.named["part0"](h, c) if "part2" not in m.named else h


@ingredient(WRAPPERS)
def by_size(m, h, c):
    return m.parts[h.shape[-1] % len(m.parts)](h, c)


@ingredient(WRAPPERS)
def inside_context(m, h, c):
    contexts = (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
    )
    with contexts[m.option]:
        return m.parts[0](h, c)


@ingredient(WRAPPERS)
def rows_apart(m, h, c):
    first, second = h.chunk(2, dim=-1)
    return torch.cat(
        [first * 0.5, m.parts[0](h, c).narrow(-1, 0, second.shape[-1]) + second], dim=-1
    )


# ---------------------------------------------------------------------------- any layout


@ingredient(ANY)
def activation(m, h, c):
    return m.act(h * 1.5) + h if m.option % 2 else m.act(h)


@ingredient(ANY)
def functional_inplace(m, h, c):
    y = h * 2
    F.silu(y, inplace=True) if m.option % 2 else F.relu_(y)
    return y - h


@ingredient(ANY)
def scale_shift(m, h, c):
    emb = m.cond(F.silu(c["emb"]))
    if m.option == 0:
        scale, shift = emb.chunk(2, dim=1)
    elif m.option == 1:
        scale, shift = emb.unflatten(1, (2, m.width)).unbind(1)
    elif m.option == 2:
        scale, shift = emb[:, : m.width], emb[:, m.width :]
    else:
        shift, scale = torch.split(emb, [m.width, m.width], dim=-1)
    return h * (1 + m.over(scale, h)) + m.over(shift, h)


@ingredient(ANY)
def add_time(m, h, c):
    h = h.clone()
    h += m.over(m.cond(c["emb"])[:, : m.width], h)
    if m.option % 2:
        h.mul_(0.5).add_(1.0)
    return h


@ingredient(ANY)
def writes_items(m, h, c):
    out = (
        torch.empty_like(h)
        if m.option % 2
        else torch.zeros(h.shape, dtype=h.dtype, device=h.device)
    )
    out[..., 0::2] = -h[..., 0::2]
    out[..., 1::2] = h[..., 1::2] * 2
    if m.option > 1:
        out[:, 0] += 1.0
    return out


@ingredient(ANY)
def writes_views(m, h, c):
    y = (h + 1).contiguous()
    flat = y.view(h.shape[0], -1) if m.option % 2 else y.flatten(1)
    flat[:, :3] *= 2
    y.select(1, 0).zero_()
    if m.option > 1:
        y.transpose(1, -1)[:, 0].copy_(flat.mean())
    return y * flat.sum(dim=1).reshape(-1, *[1] * (h.ndim - 1))


@ingredient(ANY)
def double_island(m, h, c):
    y = h.double() if m.option % 2 else h.to(torch.float64)
    y = (y - y.mean(dim=-1, keepdim=True)) / (y.std(dim=-1, keepdim=True) + 1)
    return (y.to(h.dtype), y.type_as(h), y.float(), y.to(h))[m.option]


@ingredient(ANY)
def half_trip(m, h, c):
    low = (torch.bfloat16, torch.float16)[m.option % 2]
    y = torch.tanh(h.to(low))
    return (y + m.over(m.bias, h).to(low)).to(h.dtype) if m.option > 1 else y.float()


@ingredient(ANY)
def masks(m, h, c):
    y = torch.where(h > 0, h, 0.1 * h) if m.option % 2 else h.masked_fill(h.abs() > 3, 0.0)
    return y.clamp(-2, 2) if m.option > 1 else torch.maximum(y, h.new_zeros(()))


@ingredient(ANY)
def reductions(m, h, c):
    low, high = torch.aminmax(h.flatten(1), dim=1)
    y = h - (low + high).view(-1, *[1] * (h.ndim - 1)) * 0.5
    if m.option > 1:
        y, _ = torch.sort(y, dim=-1)
    values, index = y.max(dim=-1, keepdim=True)
    return y + (values if m.option % 2 else index)


@ingredient(ANY)
def dropout(m, h, c):
    return F.dropout(m.drop(h), 0.5, m.training)


@ingredient(ANY)
def buffers(m, h, c):
    y = h * m.over(m.volatile if m.option % 2 else m.bias.abs(), h)
    return y + m.over(m.table[: h.shape[0] % 1 + 1].mean(0), h) * m.weight.norm()


@ingredient(ANY)
def branches(m, h, c):
    if c["text"] is None and m.option % 2:
        h = h + 1
    if h.ndim == 4 and m.width > 4:
        h = h * 0.5
    if h.shape[-1] > 6:
        h = -h
    return h if m.option < 2 or h.shape[1] == h.shape[-1] else h + h.shape[-2]


# ---------------------------------------------------------------------------- tokens


@ingredient(TOKENS)
def sequential(m, h, c):
    half = m.layers[:2](h)
    if m.option > 1:
        half = half / len(m.layers)
    return m.layers[2:](half) if m.option % 2 else m.layers[3](m.layers[2](half))


@ingredient(TOKENS)
def tied(m, h, c):
    return m.second(torch.tanh(m.first(m.norm(h))))


@ingredient(TOKENS)
def alias(m, h, c):
    return m.again(F.gelu(m.first(h)))


@ingredient(TOKENS)
def own_linear(m, h, c):
    weight = m.weight / m.weight.norm(dim=1, keepdim=True) if m.option % 2 else m.weight.t()
    return F.linear(h, weight, m.bias) if m.option < 2 else h @ weight + m.bias


@ingredient(TOKENS)
def rms_norm(m, h, c):
    variance = h.to(torch.float32).pow(2).mean(-1, keepdim=True)
    y = h * torch.rsqrt(variance + 1e-6)
    return (y * m.bias, y.type_as(h) * (1 + m.volatile), F.rms_norm(h, (m.width,), m.bias), y)[
        m.option
    ]


@ingredient(TOKENS)
def modulated(m, h, c):
    shift, scale = m.cond(F.silu(c["emb"])).unsqueeze(1).chunk(2, dim=2)
    h = F.layer_norm(h, (h.shape[-1],)) if m.option % 2 else F.layer_norm(h, h.shape[-1:], m.bias)
    return torch.addcmul(shift, h, 1 + scale) if m.option > 1 else h * (1 + scale) + shift


@ingredient(TOKENS)
def attention(m, h, c):
    b, n, width = h.shape
    q, k, v = m.wide(h).chunk(3, dim=-1)
    if m.option == 0:
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        return m.first(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    if m.option == 1:
        q, k, v = (x.view(b, n, HEADS, width // HEADS).permute(0, 2, 1, 3) for x in (q, k, v))
        weights = torch.einsum("bhnd,bhmd->bhnm", q, k).mul_(width**-0.5).softmax(-1)
        return torch.einsum("bhnm,bhmd->bhnd", weights, v).transpose(1, 2).reshape(h.shape)
    if m.option == 2:
        q, k, v = (
            x.reshape(b, n, HEADS, -1).transpose(1, 2).reshape(b * HEADS, n, -1) for x in (q, k, v)
        )
        space = torch.empty(b * HEADS, n, n, dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(space, q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(width))
        y = torch.bmm(scores.softmax(dim=-1), v)
        return y.view(b, HEADS, n, -1).transpose(1, 2).contiguous().view(b, -1, width)
    mask = torch.ones(n, n, dtype=torch.bool, device=h.device).tril()
    q, k, v = (einops.rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return einops.rearrange(y, "b h n d -> b n (h d)")


@ingredient(TOKENS)
def cross(m, h, c):
    text = h if c["text"] is None else c["text"]
    k, v = m.wide(text)[..., : 2 * m.width].chunk(2, -1)
    if m.option % 2:
        k, v = k.expand_as(k), v.mean(1, keepdim=True).expand(-1, k.size(1), -1)
    return F.scaled_dot_product_attention(m.first(h)[:, None], k[:, None], v[:, None]).squeeze(1)


@ingredient(TOKENS)
def multihead(m, h, c):
    y, weights = m.attention(h, h, h, need_weights=m.option % 2 == 1)
    return y if weights is None else y + weights.mean()


@ingredient(TOKENS)
def rotary(m, h, c):
    n = h.shape[1]
    angle = torch.outer(torch.arange(n, device=h.device).float(), m.volatile[: m.width // 2])
    even, odd = (
        (h[..., 0::2], h[..., 1::2]) if m.option % 2 else h.unflatten(-1, (-1, 2)).unbind(-1)
    )
    cos, sin = angle.cos(), angle.sin()
    y = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return y.flatten(-2) if m.option > 1 else y.reshape(*h.shape)


@ingredient(TOKENS)
def complex_rotary(m, h, c):
    z = torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2).contiguous())
    turn = torch.polar(torch.ones_like(m.volatile), m.volatile)[: m.width // 2]
    return torch.view_as_real(z * turn).flatten(-2)


@ingredient(TOKENS)
def positions(m, h, c):
    if m.option == 0:
        return h + m.table[: (h.shape[1] - 1) % 16 + 1]
    if m.option == 1:
        return h + F.embedding(torch.arange(h.size(1), device=h.device) % 16, m.table)
    grid = m.table.t()[None]
    return h + F.interpolate(
        grid, size=h.shape[1], mode=("nearest", "linear")[m.option % 2]
    ).transpose(1, 2)


@ingredient(TOKENS)
def registers(m, h, c):
    first = (
        m.bias.expand(h.shape[0], 1, -1)
        if m.option % 2
        else einops.repeat(m.bias, "c -> b 1 c", b=len(h))
    )
    y = torch.cat((first, h), dim=1)
    y = m.first(y) + y.mean(dim=1, keepdim=True)
    return y[:, 1:]


@ingredient(TOKENS)
def repeats(m, h, c):
    y = h.repeat_interleave(2, dim=1) if m.option % 2 else h.repeat(1, 2, 1)
    y = m.first(y)
    return y[:, : h.shape[1]] - (y[:, h.shape[1] :] if m.option < 2 else y.narrow(1, 1, h.shape[1]))


@ingredient(TOKENS)
def einops_layer(m, h, c):
    y = m.fold(h)
    return m.unfold(y) + einops.reduce(h, "b n c -> b 1 c", ("mean", "max", "sum", "min")[m.option])


@ingredient(TOKENS)
def gather_scatter(m, h, c):
    index = torch.argsort(h.sum(-1), dim=1)[..., None].expand(-1, -1, h.shape[-1])
    y = torch.gather(h, 1, index)
    if m.option % 2:
        return torch.zeros_like(h).scatter_(1, index, m.first(y))
    return y.cumsum(dim=1) if m.option == 0 else y.flip(1).roll(1, 1)


@ingredient(TOKENS)
def batch_mixing(m, h, c):
    return h - h.mean(dim=0, keepdim=True) if m.option % 2 else h + m.cond(c["emb"]).mean()


# ---------------------------------------------------------------------------- images


@ingredient(IMAGES)
def tokens(m, h, c):
    b, width, height, breadth = h.shape
    if m.option == 0:
        y = m.parts[0](h.flatten(2).transpose(1, 2), c)
        return y.transpose(1, 2).reshape(b, width, height, breadth)
    if m.option == 1:
        y = m.parts[0](h.view(b, width, height * breadth).permute(0, 2, 1), c)
        return y.permute(0, 2, 1).unflatten(2, (height, breadth))
    if m.option == 2:
        y = m.parts[0](einops.rearrange(h, "b c h w -> b (h w) c"), c)
        return einops.rearrange(y, "b (h w) c -> b c h w", h=height)
    y = m.parts[0](h.permute(0, 2, 3, 1).reshape(b, -1, width).contiguous(), c)
    return torch.movedim(y.reshape(b, *h.shape[2:], width), -1, 1)


@ingredient(IMAGES)
def res_block(m, h, c):
    y = m.conv(m.act(m.group(h)))
    y += m.cond(F.silu(c["emb"]))[:, : m.width, None, None]
    return h + m.conv(m.drop(F.silu(y))) if m.option % 2 else m.conv(y) + h


@ingredient(IMAGES)
def batch_norm(m, h, c):
    return m.act(m.batch(h))


@ingredient(IMAGES)
def own_conv(m, h, c):
    weight = m.conv.weight
    if m.option == 1:  # standardized
        mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
        return F.conv2d(h, (weight - mean) * (var + 1e-5).rsqrt(), m.bias, padding=1)
    if m.option == 2:  # depthwise
        return F.conv2d(h, weight[:, :1], padding=1, groups=h.shape[1])
    if m.option == 3:  # modulated, samples as groups
        b, _width, height, breadth = h.shape
        kernel = (weight[None] * m.cond(c["emb"])[:, : m.width, None, None, None]).flatten(0, 1)
        y = F.conv2d(h.reshape(1, -1, height, breadth), kernel, padding=1, groups=b)
        return y.view(b, -1, height, breadth)
    return F.conv2d(h, m.weight[..., None, None], m.bias)


@ingredient(IMAGES)
def resized(m, h, c):
    small = F.avg_pool2d(h, 2) if m.option % 2 else F.interpolate(h, scale_factor=0.5, mode="area")
    if m.option > 1:
        return F.interpolate(small, size=h.shape[-2:], mode="bilinear", align_corners=False) + h
    return F.interpolate(small, size=(h.size(2), h.size(3)), mode="nearest")


@ingredient(IMAGES)
def padded(m, h, c):
    mode = ("constant", "reflect", "circular", "replicate")[m.option]
    return F.conv2d(F.pad(h, (1, 1, 1, 1), mode=mode), m.conv.weight)


@ingredient(IMAGES)
def shuffled(m, h, c):
    y = (
        F.pixel_unshuffle(h, 2)
        if m.option % 2
        else einops.rearrange(h, "b c (i p) (j q) -> b (c p q) i j", p=2, q=2)
    )
    return F.pixel_shuffle(torch.tanh(y), 2)


@ingredient(IMAGES)
def coordinates(m, h, c):
    rows = torch.linspace(-1, 1, h.shape[2], device=h.device)
    columns = torch.arange(h.shape[3], dtype=h.dtype) / h.shape[3]
    i, j = torch.meshgrid(rows, columns, indexing="ij")
    return m.conv(h) + (i * j).expand_as(h) if m.option % 2 else h * torch.stack([i + j] * m.width)


@ingredient(IMAGES)
def unet(m, h, c):
    stack = [h]
    y = m.down(h) if m.option < 2 else F.avg_pool2d(h, 2)
    for part in m.parts:
        y = part(y, c)
    skip = stack.pop()
    if m.option % 2:
        y = m.up(y)
    elif m.option == 0:
        y = F.interpolate(y, size=skip.shape[-2:], mode="nearest")
    else:
        y = F.interpolate(y, scale_factor=2.0, mode="nearest")
    return m.merge(torch.cat([y, skip], 1))


# ---------------------------------------------------------------------------- traps


@ingredient(TRAPS)
def asks_data(m, h, c):
    return (
        lambda: -h if h.mean() > 0 else h,
        lambda: h * c["emb"].mean().item(),
        lambda: h * float(h.abs().max()),
        lambda: h[:, : 1 + int(h.argmax() % 2)].sum() + h,
    )[m.option]()


@ingredient(TRAPS)
def writes_buffer(m, h, c):
    if m.option == 0:
        m.volatile += 1
    elif m.option == 1:
        m.table[0] = h.mean()
    elif m.option == 2:
        m.volatile = m.volatile * 2
    else:
        m.table.t().select(0, 0).copy_(m.table[:, 0] * 2)
    return h * m.over(m.volatile + m.table[0], h)


@ingredient(TRAPS)
def leaves_torch(m, h, c):
    if m.option == 0:
        return h + torch.from_numpy(np.tanh(h.detach().cpu().numpy()))
    if m.option == 1:
        return h + torch.as_tensor(np.asarray(c["emb"].detach()).mean())
    if m.option == 2:
        return h * torch.tensor(h.flatten()[:2].tolist()).sum()
    return h + torch.tensor([float(x) for x in h[0].flatten()[:1]])


@ingredient(TRAPS)
def remembers(m, h, c):
    if m.option == 0:  # the first call's embedding for ever
        if not hasattr(m, "kept"):
            m.kept = c["emb"].mean()
        return h + m.kept
    if m.option == 1:  # counts
        m.calls = getattr(m, "calls", 0) + 1
        return h * m.calls
    if m.option == 2:  # the call before
        last, m.last = getattr(m, "last", None), h
        return h if last is None or last.shape != h.shape else h + last
    cache = m.__dict__.setdefault("cache", {})
    if h.shape[0] not in cache:
        cache[h.shape[0]] = h.mean()
    return h + cache[h.shape[0]]


@ingredient(TRAPS)
def autocasts(m, h, c):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.over(m.cond(c["emb"])[:, : m.width].float(), h) + h


@ingredient(TRAPS)
def shape_of_data(m, h, c):
    if m.option % 2:
        return h + h[h > 0].sum()
    return h + torch.nonzero(h > 0).shape[0]


@ingredient(TRAPS)
def infers(m, h, c):
    with torch.inference_mode():
        return torch.tanh(h) * m.over(m.bias, h)


# ---------------------------------------------------------------------------- timesteps

TIMES: dict[str, Callable[[Any, Tensor], Tensor]] = {}


def timestep_form(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    TIMES[function.__name__] = function
    return function


def _angles(t: Tensor, half: int) -> Tensor:
    rates = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    return t[:, None].float() * rates[None]


@timestep_form
def cos_sin(m, t):
    a = _angles(t, EMBED // 2)
    return torch.cat([a.cos(), a.sin()], dim=-1)


@timestep_form
def sin_cos(m, t):
    a = _angles(t * 1000 if t.is_floating_point() else t, EMBED // 2)
    return torch.stack([torch.sin(a), torch.cos(a)], -1).view(t.shape[0], -1)


@timestep_form
def odd_width(m, t):
    a = _angles(t, (EMBED - 1) // 2)
    return F.pad(torch.cat([a.sin(), a.cos()], 1), (0, EMBED - 2 * a.shape[1], 0, 0))


@timestep_form
def log_spaced(m, t):
    rates = torch.logspace(0, -3, EMBED // 2, dtype=torch.float64)
    a = torch.outer(t.double(), rates)
    return torch.cat((a.sin(), a.cos()), 1).to(m.frequencies.dtype)


@timestep_form
def fourier(m, t):
    a = t.to(m.frequencies).unsqueeze(-1) * m.frequencies * (2 * math.pi)
    return einops.rearrange([a.sin(), a.cos()], "two b f -> b (two f)")


@timestep_form
def written(m, t):
    out = torch.zeros(len(t), EMBED, device=t.device)
    a = _angles(t, EMBED // 2)
    out[:, 0::2] = torch.sin(a)
    out[:, 1::2] = torch.cos(a)
    return out


@timestep_form
def looked_up(m, t):
    return m.steps(t.long().clamp(0, 99))


@timestep_form
def low_precision(m, t):
    a = _angles((t.to(torch.bfloat16) / 1000).half(), EMBED // 2)
    return torch.cat([a.cos(), a.sin()], -1).to(torch.bfloat16).float()


@timestep_form
def raw(m, t):
    return (t.float() / 1000).view(-1, 1).repeat(1, EMBED)


# ---------------------------------------------------------------------------- models


@dataclass
class Sample:
    """What models with return_dict return."""

    sample: Tensor
    features: Any = None


class Denoiser(nn.Module):
    """x, t and a condition -> the output that the spec asks for."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("frequencies", torch.randn(EMBED // 2))
        self.steps, self.labels = nn.Embedding(100, EMBED), nn.Embedding(11, EMBED)
        self.mlp = nn.Sequential(nn.Linear(EMBED, EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED))
        self.body = nn.ModuleList(Cell(block, spec.width) for block in spec.body)

    def run(self, x: Tensor, t: Any, y: Any, extra: Any, scale: float) -> Any:
        if not torch.is_tensor(t):
            t = torch.tensor([t], dtype=torch.float32 if isinstance(t, float) else torch.long)
        elif t.ndim == 0:
            t = t[None]
        if self.spec.spread == 0:
            t = t.expand(x.shape[0])
        elif self.spec.spread == 1:
            t = t * torch.ones(x.shape[0], dtype=t.dtype, device=t.device)
        elif t.shape[0] != x.shape[0]:
            t = t.repeat(x.shape[0])
        emb = self.mlp(TIMES[self.spec.time](self, t))
        if y is not None:
            dropped = self.training and torch.rand(()) < 0.1
            emb = emb + self.labels(torch.full_like(y, 10) if dropped else y)
        text, h = None, x * scale
        if extra is not None:
            text = extra["text"]
            emb = emb + sum(extra["more"]) if extra["mode"] == "add" else emb
        features = []
        for part in self.body:
            h = part(h, {"emb": emb, "text": text})
            features.append(h)
        return self.output(h, emb, features)

    def output(self, h: Tensor, emb: Tensor, features: list[Tensor]) -> Any:
        kind = self.spec.output
        if kind == "tuple":
            return h, emb
        if kind == "list":
            return features
        if kind == "dict":
            return {
                "sample": h,
                "aux": {"emb": emb, "parts": (h, features[0])},
                "name": "toy",
                "none": None,
            }
        return h.chunk(2, dim=1) if kind == "chunks" else h

    def forward(
        self, x: Tensor, t: Any, y: Tensor | None = None, extra: Any = None, scale: float = 1.0
    ) -> Any:
        return self.run(x, t, y, extra, scale)


class ReturnsDict(Denoiser):
    """A denoiser in the manner of diffusers."""

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Any, y: Any = None, *, extra: Any = None, return_dict: bool = True
    ) -> Any:
        h = self.run(x, t, y, extra, 1.0)
        if not return_dict:
            return (h,)
        return Sample(sample=h)


EVERY = ANY | TOKENS | IMAGES | WRAPPERS | TRAPS


def build(spec: Spec) -> nn.Module:
    """The denoiser of a spec, its weights always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = (ReturnsDict if spec.output == "return_dict" else Denoiser)(spec)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.train(spec.training)


def inputs(spec: Spec, batch: int, side: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Arguments for forward, t as (batch,) of different timesteps."""
    generator = torch.Generator().manual_seed(seed)
    side = side or spec.side
    shape = (side, side) if spec.layout == "image" else (side,)
    order = (batch, spec.width, *shape) if spec.layout == "image" else (batch, side, spec.width)
    steps = torch.tensor(FLOATS if spec.floats else INTEGERS)
    given: dict[str, Any] = {
        "x": torch.randn(order, generator=generator),
        "t": steps[torch.randperm(len(steps), generator=generator)[:batch]],
    }
    if spec.condition == "class":
        given["y"] = torch.randint(10, (batch,), generator=generator)
    elif spec.condition == "nested":
        made = torch.randn(batch, 4, max(spec.width, EMBED), generator=generator)
        more = [made[:, 0, :EMBED].clone(), made[0, 1, :EMBED].clone()]
        given["extra"] = {"text": made[:, :2, : spec.width].clone(), "more": more, "mode": "add"}
    elif spec.condition == "optional":
        given["y"] = None
    return given


@st.composite
def blocks(draw: st.DrawFn, layout: str, depth: int = 2) -> Block:
    """A tree of ingredients that take h of `layout`."""
    plain = [*ANY, *(TOKENS if layout == "tokens" else IMAGES)]
    kind = draw(st.sampled_from([*plain, *(WRAPPERS if depth else ())]))
    option = draw(st.integers(0, OPTIONS - 1))
    inner: tuple[Block, ...] = ()
    if kind == "tokens":
        inner = (draw(blocks("tokens", max(depth - 1, 0))),)
    elif kind in WRAPPERS or kind == "unet":
        most = 2 if kind in ("loop", "by_name", "by_size", "unet") else 1
        inner = tuple(draw(st.lists(blocks(layout, max(depth - 1, 0)), min_size=1, max_size=most)))
    return Block(kind, option, inner)


@st.composite
def denoisers(draw: st.DrawFn, traps: bool = False) -> Spec:
    """A random denoiser; with `traps`, one ingredient of `TRAPS` somewhere in its body."""
    layout = draw(st.sampled_from(("image", "tokens")))
    body = draw(st.lists(blocks(layout), min_size=1, max_size=3))
    if traps:
        trap = Block(draw(st.sampled_from([*TRAPS])), draw(st.integers(0, OPTIONS - 1)))
        body.insert(draw(st.integers(0, len(body))), trap)
    return Spec(
        layout=layout,
        width=draw(st.sampled_from((4, 8))),
        side=draw(st.sampled_from((4, 8) if layout == "image" else (3, 8))),
        time=draw(st.sampled_from([*TIMES])),
        floats=draw(st.booleans()),
        spread=draw(st.integers(0, 2)),
        condition=draw(st.sampled_from(("none", "optional", "class", "nested"))),
        body=tuple(body),
        output=draw(st.sampled_from(("tensor", "tuple", "list", "dict", "chunks", "return_dict"))),
        training=draw(st.booleans()),
    )
