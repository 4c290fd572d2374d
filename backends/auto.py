"""Compile a graph with a backend that agrees with the reference: a named one, or the fastest.

Every backend is compared with the reference before it is used (`self_check`). `compile_fastest`
times each backend once for each model and machine, and keeps the choice in `cache_folder()`:
integers are used only where they are faster than compiled bfloat16 there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.backends import backend, backend_module, inductor
from tfmq_fx.backends.cpu import kernels, library
from tfmq_fx.backends.self_check import Check, Reference
from tfmq_fx.backends.support import CPU
from tfmq_fx.backends.timing import least_micros
from tfmq_fx.core.errors import BackendError, BackendWarning, ConfigError
from tfmq_fx.core.files import cache_folder, make_private, write_whole
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.core.version import __version__
from tfmq_fx.ir.graph import device_of, timestep_node
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.held_values import EXAMPLES, repeated
from tfmq_fx.ir.node_info import size_hint
from tfmq_fx.quant.quant_layer import QuantLayer

logger = logging.getLogger(__name__)
CANDIDATES = ("inductor", "openvino", "float")
FALLBACKS = ("float", "eager")  # tried in turn where the named backend fails the comparison
CALLS = 5  # that are timed; the fastest counts, for what slows others down is not the model's
Timer = Callable[[Callable[[], Any]], float]  # milliseconds of a call


@dataclass(slots=True)
class CompiledGraph:
    """A graph compiled by a backend.

    name: of the backend.  check: the comparison with the reference, None where there was none.
    millis: of a call, by backend, where several were timed.  missing: backends that are not used,
    and why.
    """

    name: str
    runner: Callable[..., Any]
    lowering: Rewrite
    check: Check | None = None
    millis: dict[str, float] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether the comparison with the reference, if there was one, has passed."""
        return self.check is None or self.check.passed


def compile_fastest(
    gm: fx.GraphModule,
    inputs: Callable[[], list[Tensor]],
    *,
    options: dict[str, Any],
    progress: bool = True,
    timer: Timer | None = None,
    cache: Path | None = None,
    reference: Reference | None = None,
) -> CompiledGraph:
    """The graph compiled by the backend that runs it fastest here, of those that agree with the
    reference.

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
    able, missing, wrong = list[str](), list[tuple[str, str]](), list[str]()
    for name in names:
        try:
            backend(name, device)
            able.append(name)
        except BackendError as error:
            missing.append((name, str(error)))
    settings = _options_by_backend(names, options)
    if "inductor" in settings:
        settings["inductor"] = {"trial": True} | settings["inductor"]

    def attempt(name: str) -> CompiledGraph | None:
        """The graph on one backend; None, and the reason in `missing`, where it is not used."""
        try:
            compiled = compile_with(name, gm, settings[name], reference)
        except BackendError as error:
            missing.append((name, str(error)))
            return None
        if compiled.agrees:
            return compiled
        wrong.append(_refusal(compiled))
        missing.append((name, wrong[-1]))
        return None

    path = cache or cache_folder() / f"auto-{_digest(gm, able)}.json"
    millis: dict[str, float] = {}
    name, measured = _read(path)
    if name in able:
        if (best := attempt(name)) is not None:
            best.millis, best.missing = measured, missing
            return best
        able.remove(name)
    best = None
    for name in progress_bar(able, "Timing backends", enabled=progress and len(able) > 1):
        if (compiled := attempt(name)) is None:
            continue
        if len(able) > 1:
            try:
                with torch.no_grad():
                    call = functools.partial(compiled.runner, *inputs())
                    millis[name] = (timer or _least_millis)(call)
            except BackendError as error:
                missing.append((name, str(error)))
                continue
        if best is None or millis[name] < millis[best.name]:
            best = compiled
    best = best or compile_with("eager", gm, {}, None)
    best.millis, best.missing = millis, missing
    if wrong:
        _warn(wrong[0], best.name)
    if len(millis) > 1:
        _write(path, best)
    return best


def compile_or_fall_back(
    name: str, gm: fx.GraphModule, options: dict[str, Any], reference: Reference | None
) -> CompiledGraph:
    """The graph compiled by the backend `name`, or with a warning by the first of `FALLBACKS` that
    agrees with the reference where `name` does not.

    options: of the backend `name`.  Raises BackendError where that one cannot run here.
    """
    missing: list[tuple[str, str]] = []
    for each in dict.fromkeys((name, *FALLBACKS)):
        try:
            compiled = compile_with(each, gm, options if each == name else {}, reference)
        except BackendError as error:
            if each == name:
                raise
            missing.append((each, str(error)))
            continue
        if compiled.agrees:
            break
        missing.append((each, _refusal(compiled)))
    if missing:
        _warn(missing[0][1], compiled.name)
    compiled.missing = missing
    return compiled


def compile_with(
    name: str, gm: fx.GraphModule, options: dict[str, Any], reference: Reference | None
) -> CompiledGraph:
    """The graph compiled by one backend, and compared with the reference if there is one.

    Layers whose kernels of this package are wrong on this machine run in floating point.
    Raises BackendError where the backend cannot run here.
    """
    device = device_of(gm)
    module = backend(name, device)
    if reference is not None and name == "inductor":
        alone = inductor.alone(device, options.get("trial"))
        if wrong := reference.wrong_layers(alone):
            options = options | {"refused": wrong}
    runner, lowering = module.compile_graph(gm, **options)
    if reference is None or name == "eager":
        return CompiledGraph(name, runner, lowering)
    check = reference.check(name, runner, lowering.gm)
    for note in check.notes:
        warnings.warn(f"backend {name!r}: {note}", BackendWarning, stacklevel=2)
    return CompiledGraph(name, runner, lowering, check)


def _refusal(compiled: CompiledGraph) -> str:
    """The reason why a backend that failed the comparison is not used, and what to report."""
    return (
        f"backend {compiled.name!r} does not answer as the reference: {compiled.check}. It is not "
        f"used. Please report this with these figures, your processor or GPU, the configuration of "
        f"the model, tfmq_fx {__version__} and torch {torch.__version__}"
    )


def _warn(reason: str, instead: str) -> None:
    """Warn that a backend answers wrongly, and which one runs the model instead."""
    text = f"{reason}. Backend {instead!r} runs the model instead."
    warnings.warn(text, BackendWarning, stacklevel=4)


def _options_by_backend(names: Sequence[str], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that each backend takes. Raises ConfigError for one that none of them takes."""
    known = {name: set(backend_module(name).OPTIONS) for name in names}
    every = sorted(set[str]().union(*known.values()))
    if unknown := sorted(set(options) - set(every)):
        raise ConfigError(
            f"no backend that runs here takes {', '.join(unknown)}; {', '.join(names)} take "
            f"{', '.join(every)}"
        )
    return {
        name: {key: value for key, value in options.items() if key in takes}
        for name, takes in known.items()
    }


def example_inputs(
    gm: fx.GraphModule,
    timesteps: Tensor | None,
    *,
    timestep: Tensor | None = None,
    factor: float = 1.0,
) -> list[Tensor]:
    """Values for the placeholders of a graph, in the sizes that it was captured with.

    Floats are standard normal times `factor`, integers 0 and booleans true; inputs that held values
    are computed from are the example's.  timestep: None is the
    middle one of `timesteps`.
    """
    if timestep is None and timesteps is not None:
        timestep = timesteps[len(timesteps) // 2]
    generator, t = torch.Generator().manual_seed(0), timestep_node(gm)
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        sizes = [size_hint(size) for size in like.shape]
        if node is t and timestep is not None:
            value = timestep.expand(sizes)
        elif node.target in gm.meta.get(EXAMPLES, {}):
            value = repeated(gm.meta[EXAMPLES][node.target], sizes)
        elif like.is_floating_point():
            value = torch.randn(sizes, dtype=torch.float32, generator=generator)
            value = value * (1.0 if node is t else factor)
        else:
            value = torch.full(sizes, like.dtype == torch.bool)
        values.append(value.to(device=like.device, dtype=like.dtype))
    return values


def _least_millis(call: Callable[[], Any]) -> float:
    return least_micros(call, calls=CALLS, warmups=2) / 1000  # the first ones compile


def _digest(gm: fx.GraphModule, names: list[str]) -> str:
    """The digest of all that the choice depends on: graph, layers, sizes and this machine."""
    sizes = [
        [size_hint(size) for size in node.meta["val"].shape]
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    machine = kernels.processor() if device_of(gm) == CPU else ""
    settings = (str(gm), sizes, names, machine, torch.__version__, torch.get_num_threads())
    words = "\n".join([*map(str, settings), library.sources()])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[str, dict[str, float]]:
    """An earlier choice and its times; ("", {}) where there is none or the file is damaged."""
    try:
        entry = json.loads(path.read_text())
        return str(entry["backend"]), {str(k): float(v) for k, v in entry["millis"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", {}


def _write(path: Path, best: CompiledGraph) -> None:
    try:
        make_private(path.parent)
        write_whole(path, json.dumps({"backend": best.name, "millis": best.millis}))
    except OSError as error:
        logger.warning("the choice of a backend is not kept: %s", error)
