"""A small model and what it is converted to, made once for the tests that verify it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.conversion.test_recipes import short
from tests.test_api import TIMES, calibrated, data, fast
from tests.toys import ToyUNet, seeded
from tfmq_fx import convert
from tfmq_fx.capture.capture import capture
from tfmq_fx.conversion.models import Converted
from tfmq_fx.core.presets import resolve
from tfmq_fx.diagnostics.random_inputs import Example, RandomInputs, batches, draw_examples
from tfmq_fx.quant.quant_layer import QuantLayer

KEYS = torch.tensor(TIMES)


@functools.cache
def toy() -> Any:
    return seeded(ToyUNet).eval()


@functools.cache
def captured() -> Any:
    """The toy as a graph."""
    return capture(toy(), dict(zip(("x", "t"), data(8)[0], strict=True)), timestep="t").gm


@functools.cache
def lossy(config: str = "w8a8", mode: str = "table") -> Converted:
    """The toy converted; not to be changed."""
    recipe = fast(config, mode=mode) if config in ("w8a8", "w4a8") else short(resolve(config))
    return convert(calibrated(toy(), 8, recipe), progress=False)


def examples(model: Converted, count: int = 8) -> list[Example]:
    """What `verify` compares the toy on, several draws of it, in batches."""
    made: list[Example] = []
    for seed in range(count):
        draw = RandomInputs(model.gm, model.call, KEYS, seed=seed)
        made += draw_examples(draw, conditions=1, every=False)
    return batches(model.call, made, 8)


def leaves(model: Converted, site: str) -> dict[str, Any]:
    """The calls of the quantized layers that stand for a layer of the toy, by path."""
    calls = {str(n.target): n for n in model.gm.graph.find_nodes(op="call_module")}
    return {
        path: node
        for path, node in calls.items()
        if (path == site or path.startswith(f"{site}."))
        and isinstance(model.gm.get_submodule(path), QuantLayer)
    }


def spoil(model: Converted, site: str, what: str, factor: float) -> None:
    """Multiply the weight scale or the input scale of a layer of `model`."""
    found = leaves(model, site)
    assert found
    for path, node in found.items():
        layer: Any = model.gm.get_submodule(path)
        if what == "weight":
            layer.weight_scale.mul_(factor)
        elif not layer.per_timestep:
            layer.act_scale.mul_(factor)
        else:
            row, (_, column) = node.args[1].args
            model.gm.get_buffer(row.args[0].target)[:, column] *= factor
