"""Every architecture, captured exactly: any form of its inputs, sizes it was not traced at."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tfmq_fx.api import fold_timesteps, save
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.capture.inputs import find_timestep
from tfmq_fx.capture.nested_values import outline
from tfmq_fx.core.errors import InputError
from tfmq_fx.diagnostics.analyze import analyze
from tfmq_fx.prologue.load_model import load

# What binds a model to the batch or the resolution it was captured at: its own Python.
LISTS_OF_SAMPLES = {"z-image"}
ONE_RESOLUTION = {
    "cogvideox-2b": "computes its positional embedding anew for another size",
    "dit-xl-2": "reads the number of tokens as a number",
    "pixart-alpha": "computes its positional embedding anew for another size",
    "pixart-alpha-1024": "computes its positional embedding anew for another size",
    "pixart-sigma": "computes its positional embedding anew for another size",
    "qwen-image": "takes the resolution as numbers (img_shapes)",
    "z-image": "counts the tokens of each sample",
}
VARIANTS = {name for name in zoo.ENTRIES if name.startswith("sd15-")}
# many layers, and sizes that are long to trace
LARGE = VARIANTS | {"adm", "controlnet-sd15", "ldm-vq", "sd15", "sd21", "sdxl", "svd"}


def names(slow: Collection[str] = ()) -> list[Any]:
    """Every architecture; those of `slow` in the slow tests."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in zoo.ENTRIES]


# Shares of the parameters, in percent, that depend on t alone, and on t and small conditions; KiB
# of the rows for one timestep in fp16: found by another implementation of the same analysis.
SHARES = {
    "ddpm-cifar10": (8.08, 8.08, 9.75),
    "ldm-vq": (4.62, 4.62, 25.4),
    "sd15": (3.24, 3.24, 39.4),
    "adm": (0.25, 9.79, 69.8),
    "sdxl": (0.08, 0.97, 26.9),
    "svd": (0.13, 3.69, 118.1),  # three frames, each with a row of its own
    "dit-xl-2": (6.07, 40.49, 382.5),
    "sd3": (0.14, 33.7, 858.0),
    "flux-dev": (0.09, 27.56, 2064.0),
    "wan-1.3b": (1.21, 1.21, 21.0),
    "cogvideox-2b": (21.12, 21.12, 1354.0),
}

MAIN = ("sd15", "dit-xl-2")


def free_sizes(name: str, model: nn.Module) -> dict[str, dict[int, str]]:
    """Every size that differs between two batches or two resolutions, by name."""
    base, other = zoo.inputs(name, model), zoo.inputs(name, model, scale=2)
    found: dict[str, dict[int, str]] = {}
    names: dict[tuple[str, int, int], str] = {}

    def size(kind: str, m: int, n: int) -> str:  # height, height_8, ...: one for each pair of sizes
        plain = kind if kind not in names.values() else f"{kind}_{m}"
        return names.setdefault((kind, m, n), plain)

    for key, value in base.items():
        if key == find_timestep(base, None):
            continue
        for (path, a), (_, b) in zip(
            *(outline(v, key)[1] for v in (value, other[key])), strict=True
        ):
            sizes = {
                i: size(
                    ("height", "width")[i - a.ndim] if a.ndim > 3 and i >= a.ndim - 2 else "tokens",
                    m,
                    n,
                )
                for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True))
                if m != n
            }
            if (
                a.shape[0] == 2
                and name not in LISTS_OF_SAMPLES
                and key not in ("img_ids", "txt_ids")
            ):
                sizes[0] = "batch"
            if sizes:
                found[path] = sizes
    return found


def captured_at(name: str, dtype: torch.dtype, dynamic: Any) -> tuple[nn.Module, Captured, str]:
    model = zoo.model(name, dtype=dtype)
    inputs = zoo.inputs(name, model)
    timestep = find_timestep(inputs, None)
    if dynamic is None:
        dynamic = free_sizes(name, model)
    return model, capture(model, inputs, timestep=timestep, dynamic=dynamic), timestep


def forms(t: Tensor) -> Iterator[Any]:
    """The ways to say the timesteps t (B,): each row of its own, or one for all."""
    yield t
    yield torch.full_like(t, t[-1].item())
    yield t[-1].clone()
    yield t[-1].item()


def same(found: Any, expected: Any) -> None:
    (a, ours), (b, theirs) = outline(found), outline(expected)
    assert type(found) is type(expected) and a == b
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), path


@torch.no_grad()
def check(model: nn.Module, captured: Captured, inputs: dict[str, Any], timestep: str) -> None:
    """The graph answers as the model does; where the model takes no numbers or 0-d timesteps, as it
    does for a row of them."""
    last = inputs[timestep]
    rows = (last * torch.arange(1, len(last) + 1) / len(last)).to(last)
    for t in forms(rows):
        given = {**inputs, timestep: t}
        try:
            expected = model(**given)
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            assert not isinstance(t, Tensor) or t.dim() == 0
            row = torch.as_tensor(t).to(rows).expand(len(rows)).contiguous()
            expected = model(**{**inputs, timestep: row})
        values, return_dict = captured.call.bind((), given)
        same(captured.call.rebuild(captured.gm(*values), return_dict), expected)


@pytest.mark.parametrize("name", names(slow=VARIANTS | {"ldm-vq", "sd21", "svd"}))
def test_exact_at_any_batch_and_form_of_the_timestep(name: str) -> None:
    model, captured, timestep = captured_at(name, torch.float32, ("batch",))
    assert captured.route == "trace"
    for batch in (2,) if name in LISTS_OF_SAMPLES else (1, 3):
        check(model, captured, zoo.inputs(name, model, batch), timestep)


@pytest.mark.parametrize("name", names(slow=VARIANTS))
def test_exact_in_bfloat16(name: str) -> None:
    model, captured, timestep = captured_at(name, torch.bfloat16, ())
    check(model, captured, zoo.inputs(name, model), timestep)


@pytest.mark.parametrize("name", names(slow=LARGE))
def test_exact_at_another_resolution(name: str) -> None:
    model, captured, timestep = captured_at(name, torch.float32, None)
    check(model, captured, zoo.inputs(name, model), timestep)
    batch = 2 if name in LISTS_OF_SAMPLES else 3
    other = zoo.inputs(name, model, batch, scale=2)
    if name in ONE_RESOLUTION:
        with pytest.raises(InputError, match=r"captured (where|as)"):
            check(model, captured, other, timestep)
    else:
        check(model, captured, other, timestep)


def test_return_types_go_both_ways() -> None:
    for name in ("sd15", "flux-dev", "dit-xl-2"):
        model, captured, _ = captured_at(name, torch.float32, ())
        inputs = zoo.inputs(name, model)
        for return_dict in (True, False):
            with torch.no_grad():
                expected = model(**inputs, return_dict=return_dict)
                values, wanted = captured.call.bind((), {**inputs, "return_dict": return_dict})
                same(captured.call.rebuild(captured.gm(*values), wanted), expected)


@pytest.mark.parametrize("name", names(slow=LARGE - {"sd15"}))
def test_tables_are_exact_at_batch_one(name: str, tmp_path: Path) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs(name, model, batch=1)
    timestep = find_timestep(inputs, None)
    last = inputs[timestep]
    steps = (
        last * torch.tensor([1, 0.5, 0.25]) if last.is_floating_point() else torch.arange(3) * 99
    )
    folded = fold_timesteps(model, steps, inputs)
    block = folded.record["block"]
    # a distilled model adds the guidance scale before the first layer: nothing is the timestep's
    assert bool(block["features"]) is (name != "sd15-distilled") and not block["declined"]
    kept = {node.target for node in folded.gm.graph.nodes if node.op == "call_module"}
    assert not kept & set(block["modules"])
    for step in steps:
        given = {**inputs, timestep: step[None]}
        with torch.no_grad():
            same(folded(**given), model(**given))
    save(folded, tmp_path / "model")
    with torch.no_grad():
        same(load(tmp_path / "model")(**given), folded(**given))


SAMPLE = [pytest.mark.slow, pytest.mark.sample]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=[] if n in MAIN else SAMPLE if n == "ddpm-cifar10" else [pytest.mark.slow]
        )
        for n in SHARES
    ],
)
def test_shares_of_published_models(name: str) -> None:
    entry = zoo.ENTRIES[name]
    data = analyze(zoo.CONFIGS / f"{entry.config}.json", conditions=entry.conditions).data
    t, early, row = SHARES[name]
    assert data["parameters"] / 1e6 == pytest.approx(entry.millions, abs=0.2)
    part = {
        key: 100 * row["parameters"] / data["parameters"] for key, row in data["bindings"].items()
    }
    assert part["t"] == pytest.approx(t, abs=0.006)
    assert part["t"] + part["c"] + part["(t, c)"] == pytest.approx(early, abs=0.006)
    rows = data["conditioned"]["rows"]
    stored = sum(rows[key]["row_bytes"] for key in rows) if entry.conditions else 0
    stored = stored or sum(
        2 * torch.Size(shape).numel() for _, shape, _ in data["block"]["features"]
    )
    assert stored / 1024 == pytest.approx(row, rel=0.005)
