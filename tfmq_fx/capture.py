"""nn.Module -> flat graph: trace on symbolic sizes, then prove it equal to the model by replay."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import logging
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.proxy import Proxy

from .dialect import Stage, check
from .errors import CaptureError, ConfigError, TfmqError
from .guards import guard, same_operations
from .replay import arguments, replay, structural_clone
from .signature import BATCH, Argument, CallSpec, Input
from .structure import Branch, Const, Leaf, Structure, outline
from .tracer import SizeTest, ValueTracer

log = logging.getLogger(__name__)

_DYNAMIC = ("batch", "spatial")
_TRIES = 8  # tests on sizes tried one by one for whether they matter


@dataclass(frozen=True)
class Captured:
    """A flat graph and how to call it like the model. notes: what a report should say about it."""

    gm: fx.GraphModule
    call: CallSpec
    route: str
    seconds: float
    notes: tuple[str, ...]


def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    timestep: str,
    dynamic: Collection[str] = ("batch",),
) -> Captured:
    """The model's graph at Stage.CAPTURED, in eval mode; the model is not changed.

    example_inputs: by parameter name of forward; tensors, also inside dicts and lists, become
    placeholders, everything else is fixed.  timestep: which of them is the timestep; the graph
    takes it as a tensor (batch,) of the example's dtype (int -> int64, float -> float32).
    dynamic: "batch" frees dim 0 of every input that has the sample's batch; "spatial" also the last
    two dims of inputs with four or more dims that have the sample's.
    Parameters and buffers are shared with the model; modules are copies.
    """
    start = time.perf_counter()
    unknown = set(dynamic) - set(_DYNAMIC)
    if unknown:
        raise ConfigError(f"dynamic: unknown {sorted(unknown)}; known are {', '.join(_DYNAMIC)}")
    call, examples = _describe_call(model, example_inputs, timestep, dynamic)
    trace = _trace(model, call, examples)
    binding = _binding(model, call, examples, trace)
    notes = [
        f"captured where {test.expression} is {test.held} ({test.source})"
        if test in binding
        else f"{test.expression} ({test.source}) is {test.held} here and chooses a memory layout "
        f"only: where it is not, the graph equals the model up to the order of float additions"
        for test in trace.tests
    ]
    guards = tuple(guard(test) for test in binding)
    call = dataclasses.replace(call, output=trace.output, guards=guards)
    notes += replay(model, trace.gm, call, examples)
    seconds = time.perf_counter() - start
    log.debug("captured %s in %.2f s", type(model).__name__, seconds)
    return Captured(trace.gm, call, "trace", seconds, tuple(notes))


def _describe_call(
    model: nn.Module, example_inputs: Mapping[str, Any], timestep: str, dynamic: Collection[str]
) -> tuple[CallSpec, list[Tensor]]:
    """How forward is called, its output left open, and the example's tensors in order."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
    }
    catch_all = [n for n, p in parameters.items() if p.kind is p.VAR_KEYWORD]
    for name in catch_all:
        del parameters[name]
    given = dict(example_inputs)
    unknown = [name for name in given if name not in parameters]
    if unknown and not catch_all:
        raise ConfigError(
            f"example_inputs: forward has no {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(parameters)}"
        )
    if timestep not in given:
        raise ConfigError(
            f"timestep={timestep!r} is not among the example inputs {', '.join(given)}"
        )
    for name in unknown:
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    return_dict = None
    if "return_dict" in parameters:
        return_dict = parameters["return_dict"].default is not False
    given.pop("return_dict", None)

    declared: list[Argument] = []
    leaves: list[tuple[str, Any]] = []
    for name, parameter in parameters.items():
        default = parameter.default
        structure: Structure = Const(default)
        found: list[tuple[str, Any]] = []
        omittable = True
        if name == "return_dict":
            pass
        elif name == timestep:
            structure, found, omittable = Leaf(0), [(name, given[name])], False
        elif name in given:
            structure, found = outline(given[name], name)
            omittable = not found and default is not parameter.empty
            omittable = omittable and structure == outline(default, name)[0]
        elif default is parameter.empty:
            raise ConfigError(f"example_inputs: forward needs {name!r}")
        else:
            structure = outline(default, name)[0]
        positional = parameter.kind is not parameter.KEYWORD_ONLY
        declared.append(Argument(name, structure, len(leaves), positional, omittable))
        leaves += found
    paths = [path for path, _ in leaves]
    tensors = _batched([value for _, value in leaves], paths.index(timestep), BATCH in dynamic)
    inputs = _inputs(paths, tensors, timestep, dynamic)
    where = inputs[paths.index(timestep)].name
    call = CallSpec(tuple(declared), inputs, where, Const(None), return_dict)
    return call, tensors


def _batched(values: list[Any], timestep: int, free: bool) -> list[Tensor]:
    """The example's tensors, a batch of one made two (torch fixes sizes of one), and the timestep
    made a tensor (batch,)."""
    others = [value for i, value in enumerate(values) if i != timestep]
    sample = _sample(others)
    t = values[timestep]
    if isinstance(t, bool) or not isinstance(t, (int, float, Tensor)):
        raise ConfigError(f"the timestep must be a number or a tensor, got {type(t).__name__}")
    if not isinstance(t, Tensor):
        t = torch.tensor(t, dtype=torch.int64 if isinstance(t, int) else torch.float32)
    batch = sample.shape[0] if sample is not None else max(t.numel(), 1)
    if t.ndim > 1 or t.numel() not in (1, batch) or t.dtype == torch.bool:
        raise CaptureError(
            f"the timestep has shape {tuple(t.shape)} and {t.dtype}; expected one number for each "
            f"of the {batch} samples, or one for all"
        )
    if free and batch == 1:
        batch = 2
        values = [v.repeat(2, *[1] * (v.ndim - 1)) if _rows(v) == 1 else v for v in values]
    tensors = [value.detach() if isinstance(value, Tensor) else value for value in values]
    device = sample.device if sample is not None else t.device
    row = t.detach().reshape(-1).to(device)
    tensors[timestep] = row if len(row) == batch else row[:1].expand(batch).contiguous()
    return tensors


def _rows(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else None


def _sample(tensors: list[Tensor]) -> Tensor | None:
    """The input whose dim 0 is the batch: the first image-like one, else the one with most dims."""
    images = [tensor for tensor in tensors if tensor.ndim >= 4]
    if images:
        return images[0]
    return max((x for x in tensors if x.ndim), key=lambda tensor: tensor.ndim, default=None)


def _inputs(
    paths: list[str], tensors: list[Tensor], timestep: str, dynamic: Collection[str]
) -> tuple[Input, ...]:
    sample = _sample([x for path, x in zip(paths, tensors, strict=True) if path != timestep])
    batch = tensors[paths.index(timestep)].shape[0]
    inputs: list[Input] = []
    for path, tensor in zip(paths, tensors, strict=True):
        shape: list[int | str] = list(tensor.shape)
        if BATCH in dynamic and _rows(tensor) == batch:
            shape[0] = BATCH
        if (
            "spatial" in dynamic
            and sample is not None
            and min(tensor.ndim, sample.ndim) >= 4
            and tensor.shape[-2:] == sample.shape[-2:]
        ):
            shape[-2:] = "height", "width"
        name = re.sub(r"\W", "_", path)
        if keyword.iskeyword(name) or name in {spec.name for spec in inputs}:
            name = f"{name}_{len(inputs)}"
        inputs.append(Input(name, path, tuple(shape), tensor.dtype, tensor.device.type))
    return tuple(inputs)


@dataclass(frozen=True, slots=True)
class _Trace:
    """A graph, the structure of its output, and the tests on sizes that led there."""

    gm: fx.GraphModule
    output: Structure
    tests: list[SizeTest]


def _trace(
    model: nn.Module,
    call: CallSpec,
    examples: list[Tensor],
    forced: Mapping[SizeTest, bool] | None = None,
) -> _Trace:
    """Trace the model; tests in `forced` come out as given there instead of as they do."""
    clone = structural_clone(model)
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    sizes: dict[str, Any] = {}
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    fakes: dict[str, Tensor] = {}
    for spec, example in zip(call.inputs, examples, strict=True):
        for size, hint in zip(spec.shape, example.shape, strict=True):
            if isinstance(size, str) and size not in sizes:
                source = ConstantSource(size)
                symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
                sizes[size] = shapes.create_symintnode(symbol, hint=hint, source=source)
                names[symbol] = sympy.Symbol(size, integer=True, positive=True)
        with mode:
            shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
            fakes[spec.name] = torch.empty(shape, dtype=spec.dtype, device=example.device)

    output: Structure = Const(None)

    def run(proxies: list[Any]) -> tuple[Any, ...]:
        nonlocal output
        kwargs = arguments(call, proxies)
        if call.return_dict is not None:
            kwargs["return_dict"] = True
        # _call_impl: __call__ is patched to trace submodules, and the root is none.
        output, leaves = outline(clone._call_impl(**kwargs))
        return tuple(value for _, value in leaves)

    tracer = ValueTracer(clone, mode, fakes, run, names, forced or {})
    try:
        graph = tracer.run()
    except TfmqError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{tracer.last}: tracing {type(model).__name__} failed: {type(error).__name__}: {error}"
        ) from error
    _check_output(output)
    gm = fx.GraphModule(clone, graph, type(model).__name__)
    gm.eval()
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    gm.meta.update(stage=Stage.CAPTURED, timestep=call.timestep)
    check(gm, Stage.CAPTURED)
    return _Trace(gm, output, tracer.tests)


def _binding(
    model: nn.Module, call: CallSpec, examples: list[Tensor], trace: _Trace
) -> list[SizeTest]:
    """The tests whose outcome matters: with the others turned round, the operations are the same.

    diffusers tests batch >= 64 and numel > 2**31 only to call contiguous(), which changes no value.
    """

    def idle(tests: list[SizeTest]) -> bool:
        turned = {dataclasses.replace(test, held=True): not test.held for test in tests}
        try:
            other = _trace(model, call, examples, turned)
        except TfmqError:
            return False
        return other.output == trace.output and same_operations(trace.gm.graph, other.gm.graph)

    branches = [test for test in trace.tests if test.branch]
    if not branches or idle(branches):
        return [test for test in trace.tests if not test.branch]
    if len(branches) > _TRIES:
        return trace.tests
    return [test for test in trace.tests if not (test.branch and idle([test]))]


def _check_output(output: Structure) -> None:
    if isinstance(output, Branch):
        for child in output.children:
            _check_output(child)
    elif isinstance(output, Const) and isinstance(output.value, (Proxy, torch.SymInt)):
        raise CaptureError("forward returns a size that varies; return tensors and constants only")
