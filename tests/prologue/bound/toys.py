"""A conditional toy model for bound requests, its inputs, and what its bound form must answer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_end_to_end import (
    fast,
)
from tests.toys import ToyDiT, seeded, sinusoidal
from tfmq_fx import (
    Bound,
    Converted,
    bind_request,
    calibrate,
    prepare,
)
from tfmq_fx.capture.nested_values import outline

Inputs = dict[str, Any]
STEPS = [999, 750, 500, 250, 0]
WIDTH, TOKENS = 8, 6


class Conditional(nn.Module):
    """Values of the timestep, of the timestep and a class, and of a text, all worth storing.

    mix: share of the batch's mean in each sample's embedding.  shows: the embedding is an output.
    """

    def __init__(self, wide: int = 512, mix: float = 0.0, shows: bool = False) -> None:
        super().__init__()
        self.mix, self.shows = mix, shows
        self.time = nn.Sequential(nn.Linear(WIDTH, wide), nn.SiLU(), nn.Linear(wide, WIDTH))
        self.label = nn.Embedding(10, wide)
        self.widen, self.merge = nn.Linear(WIDTH, wide), nn.Linear(wide, 2 * WIDTH)
        self.scale = nn.Parameter(torch.ones(2 * WIDTH))
        self.text = nn.Linear(WIDTH, wide)
        self.q, self.k, self.v = (nn.Linear(n, WIDTH) for n in (WIDTH, wide, wide))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Any:
        own = self.time(sinusoidal(t, WIDTH).to(x.dtype))
        wide = self.label(y) + self.widen(own)
        if self.mix:
            wide = wide + self.mix * wide.mean(0, keepdim=True)
        both = self.merge(F.silu(wide)) * self.scale
        scale, shift = both[:, None].chunk(2, -1)
        h = x * (1 + scale) + shift
        text = F.silu(self.text(text))
        h = h + F.scaled_dot_product_attention(self.q(h), self.k(text), self.v(text))
        h = h * own[:, None]
        return (h, both) if self.shows else h


def draw(batch: int = 2, seed: int = 0, t: Any = 500, tokens: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, TOKENS, WIDTH, generator=generator),
        "t": torch.full((batch,), t) if isinstance(t, int) else torch.as_tensor(t),
        "y": torch.randint(10, (batch,), generator=generator),
        "text": torch.randn(batch, tokens, WIDTH, generator=generator),
    }


def conditional(**options: Any) -> nn.Module:
    model: nn.Module = seeded(Conditional, **options)
    return model.eval()


@functools.cache
def captured(**options: Any) -> tuple[nn.Module, Converted]:
    model = conditional(**options)
    return model, bind_request(model, example_inputs=draw()).unbound()


def bound(timesteps: Any = None, **options: Any) -> Bound:
    return bind_request(captured()[1], timesteps, **options)


def of(values: Inputs) -> Any:
    """The original's answer."""
    return captured()[0](**values)


def check(found: nn.Module, values: Inputs, expected: nn.Module | None = None) -> None:
    wanted = outline((expected or captured()[0])(**values))
    given = outline(found(**values))
    assert wanted[0] == given[0]
    for (path, a), (_, b) in zip(wanted[1], given[1], strict=True):
        assert torch.equal(a, b), f"{path} differs by {(a - b).abs().max()}"


def computed(found: Bound) -> dict[tuple[tuple[str, ...], bool], int]:
    """How many values were computed so far, by what they depend on."""
    return {(p.part.conditions, p.part.stepped): p.computed for p in found.prologue.parts}


T, TC, C = ((), True), (("y",), True), (("text",), False)


@functools.cache
def quantizable() -> tuple[nn.Module, Any]:
    model = seeded(ToyDiT).eval()
    prepared = prepare(model, next(labelled(2)), config=fast("w8a8"))
    calibrate(prepared, labelled(4), progress=False)
    return model, prepared


def labelled(batch: int) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(batch)
    for seed, step in enumerate((999, 600, 250)):
        x = torch.randn(batch, 3, 8, 8, generator=generator)
        yield {"x": x, "t": torch.full((batch,), step), "y": (torch.arange(batch) + seed) % 10}
