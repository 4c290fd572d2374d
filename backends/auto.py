"""Choose the backend that runs a whole model by a short trial of each, once for each machine.

Integers are used only where they are faster than compiled bfloat16 on this machine. The choice is
kept for the next start in `cache_folder()`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.backends import backend
from tfmq_fx.backends.cpu import kernels, library
from tfmq_fx.backends.proven import Made, make, options_of, refusal, warn
from tfmq_fx.backends.self_check import Check, Reference
from tfmq_fx.backends.support import CPU
from tfmq_fx.backends.timing import least_micros
from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.files import cache_folder, make_private, write_whole
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.ir.graph import device_of, timestep_node
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.node_info import size_hint
from tfmq_fx.quant.quant_layer import QuantLayer

logger = logging.getLogger(__name__)
CANDIDATES = ("inductor", "openvino", "float")
CALLS = 5  # that are timed; the fastest counts, for what slows others down is not the model's
Timer = Callable[[Callable[[], Any]], float]  # milliseconds of a call


@dataclass(slots=True)
class Fastest:
    """The chosen backend: its name, what it compiled, milliseconds of a call by backend where they
    were measured, and why other backends were not tried."""

    name: str
    runner: Callable[..., Any]
    lowering: Rewrite
    millis: dict[str, float] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)
    check: Check | None = None


def compile_fastest(
    gm: fx.GraphModule,
    inputs: Callable[[], list[Tensor]],
    *,
    options: dict[str, Any],
    progress: bool = True,
    timer: Timer | None = None,
    cache: Path | None = None,
    reference: Reference | None = None,
) -> Fastest:
    """The graph on the backend that runs it fastest here, of those that answer as the reference.

    On the CPU a quantized graph is compiled and timed on each of `CANDIDATES` that can run it, or,
    once that was done, compiled by the winner alone. Elsewhere, and for a graph without integers,
    which must stay exact, it is inductor; where nothing else can run, eager.
    inputs: values to time with.  options: each goes to the backends that take it.  timer: of a
    call; None takes the least of `CALLS`.  cache: file of the choice; None is the one of this graph
    and machine.  reference: what backends are compared with; None compares nothing.
    Raises ConfigError for an option that none of the backends takes.
    """
    device = device_of(gm)
    quantized = any(isinstance(module, QuantLayer) for module in gm.modules())
    names = CANDIDATES if device.type == "cpu" and quantized else CANDIDATES[:1]
    able, missing = [], []
    for name in names:
        try:
            backend(name, device)
            able.append(name)
        except BackendError as error:
            missing.append((name, str(error)))
    wanted = options_of(names, options)
    if "inductor" in wanted:
        wanted["inductor"] = {"trial": True} | wanted["inductor"]
    path = cache or cache_folder() / f"auto-{_digest(gm, able)}.json"
    known = _read(path)
    wrong: list[tuple[str, str]] = []
    if known is not None and known[0] in able:
        kept = _tried(known[:1], gm, wanted, reference, missing, wrong)
        if kept:
            return _chosen(kept[0], known[1], missing)
        able.remove(known[0])
    best: Made | None = None
    millis: dict[str, float] = {}
    for name in progress_bar(able, "Timing backends", enabled=progress and len(able) > 1):
        for made in _tried([name], gm, wanted, reference, missing, wrong):
            if len(able) > 1:
                try:
                    millis[name] = _time(made.runner, inputs(), timer or _least_millis)
                except BackendError as error:
                    missing.append((name, str(error)))
                    continue
            if best is None or millis[name] < millis[best.name]:
                best = made
    if best is None:
        best = make("eager", gm, {}, None)
    if wrong:
        warn(wrong[0][1], best.name)
    found = _chosen(best, millis, missing)
    if len(millis) > 1:
        _write(path, found)
    return found


def _tried(
    names: Sequence[str],
    gm: fx.GraphModule,
    options: dict[str, dict[str, Any]],
    reference: Reference | None,
    missing: list[tuple[str, str]],
    wrong: list[tuple[str, str]],
) -> list[Made]:
    """The graph on those of some backends that compile it and answer rightly; of the others, the
    reasons go to `missing`, and of those that answer wrongly to `wrong` as well."""
    found = []
    for name in names:
        try:
            made = make(name, gm, options[name], reference)
        except BackendError as error:
            missing.append((name, str(error)))
            continue
        if made.is_right:
            found.append(made)
        else:
            wrong.append((name, refusal(made)))
            missing.append(wrong[-1])
    return found


def _chosen(made: Made, millis: dict[str, float], missing: list[tuple[str, str]]) -> Fastest:
    return Fastest(made.name, made.runner, made.lowering, dict(millis), missing, made.check)


def example_inputs(
    gm: fx.GraphModule,
    timesteps: Tensor | None,
    *,
    timestep: Tensor | None = None,
    factor: float = 1.0,
) -> list[Tensor]:
    """Values for the placeholders of a graph in the sizes of its capture: floats standard normal
    times `factor`, the timestep as given or the middle one of those known, integers 0, booleans
    true."""
    if timestep is None and timesteps is not None:
        timestep = timesteps[len(timesteps) // 2]
    generator, t = torch.Generator().manual_seed(0), timestep_node(gm)
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        sizes = [size_hint(size) for size in like.shape]
        if node is t and timestep is not None:
            value = timestep.expand(sizes)
        elif like.is_floating_point():
            value = torch.randn(sizes, dtype=torch.float32, generator=generator)
            value = value * (1.0 if node is t else factor)
        else:
            value = torch.full(sizes, like.dtype == torch.bool)
        values.append(value.to(device=like.device, dtype=like.dtype))
    return values


def _time(runner: Callable[..., Any], inputs: list[Tensor], timer: Timer) -> float:
    with torch.no_grad():
        return timer(lambda: runner(*inputs))


def _least_millis(call: Callable[[], Any]) -> float:
    return least_micros(call, calls=CALLS, warmups=2) / 1000  # the first ones compile


def _digest(gm: fx.GraphModule, names: list[str]) -> str:
    """A digest of what the choice depends on: the graph, its layers and sizes, and this machine."""
    sizes = [
        [size_hint(size) for size in node.meta["val"].shape]
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    machine = kernels.processor() if device_of(gm) == CPU else ""
    settings = (str(gm), sizes, names, machine, torch.__version__, torch.get_num_threads())
    words = "\n".join([*map(str, settings), library.sources()])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[str, dict[str, float]] | None:
    """An earlier choice, and what was measured; None where there is none or it is damaged."""
    try:
        entry = json.loads(path.read_text())
        return str(entry["backend"]), {str(k): float(v) for k, v in entry["millis"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, best: Fastest) -> None:
    try:
        make_private(path.parent)
        write_whole(path, json.dumps({"backend": best.name, "millis": best.millis}))
    except OSError as error:
        logger.warning("the choice of a backend is not kept: %s", error)
