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
from .replay import arguments, replay, structural_clone
from .signature import BATCH, Argument, CallSpec, Guard, Input
from .structure import Branch, Const, Expression, Leaf, Structure, outline
from .tracer import SizeTest, ValueTracer

log = logging.getLogger(__name__)

_DYNAMIC = ("batch", "spatial")
_RELATIONS = {
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
}
_BINARY = {
    **_RELATIONS,
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "IntTrueDiv": "truediv",
    "FloatTrueDiv": "truediv",
    "Mod": "mod",
    "PythonMod": "mod",
    "PowByNatural": "pow",
    "Pow": "pow",
}
_MANY = {"Add": "add", "Mul": "mul", "Max": "max", "Min": "min"}


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
    gm, call, notes = _trace(model, call, examples)
    notes += replay(model, gm, call, examples)
    seconds = time.perf_counter() - start
    log.debug("captured %s in %.2f s", type(model).__name__, seconds)
    return Captured(gm, call, "trace", seconds, tuple(notes))


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


def _trace(
    model: nn.Module, call: CallSpec, examples: list[Tensor]
) -> tuple[fx.GraphModule, CallSpec, list[str]]:
    clone = structural_clone(model)
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    sizes: dict[str, Any] = {}
    names: dict[sympy.Symbol, str] = {}
    fakes: dict[str, Tensor] = {}
    for spec, example in zip(call.inputs, examples, strict=True):
        for size, hint in zip(spec.shape, example.shape, strict=True):
            if isinstance(size, str) and size not in sizes:
                source = ConstantSource(size)
                symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
                sizes[size] = shapes.create_symintnode(symbol, hint=hint, source=source)
                names[symbol] = size
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

    tracer = ValueTracer(clone, mode, fakes, run)
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
    guards = tuple(_guard(test, names) for test in tracer.tests)
    notes = [f"captured where {guard.text} is {guard.holds} ({guard.source})" for guard in guards]
    return gm, dataclasses.replace(call, output=output, guards=guards), notes


def _check_output(output: Structure) -> None:
    if isinstance(output, Branch):
        for child in output.children:
            _check_output(child)
    elif isinstance(output, Const) and isinstance(output.value, (Proxy, torch.SymInt)):
        raise CaptureError("forward returns a size that varies; return tensors and constants only")


def _guard(test: SizeTest, names: dict[sympy.Symbol, str]) -> Guard:
    pretty = {symbol: sympy.Symbol(name) for symbol, name in names.items()}
    text = str(test.expression.xreplace(pretty))
    return Guard(_expression(test.expression, names, test.source), test.held, text, test.source)


def _expression(expression: Any, names: dict[sympy.Symbol, str], source: str) -> Expression:
    """A sympy expression over sizes as plain data."""
    if isinstance(expression, sympy.Symbol) and expression in names:
        return names[expression]
    if expression.is_Boolean and not expression.free_symbols:
        return bool(expression)
    if expression.is_number:
        return int(expression) if expression.is_integer else float(expression)
    kind = type(expression).__name__
    operands = [_expression(argument, names, source) for argument in expression.args]
    if kind in ("And", "Or", "Not"):
        return (kind.lower(), *operands)
    if kind in _BINARY and len(operands) == 2:
        return (_BINARY[kind], *operands)
    if kind in ("ToFloat", "Identity"):
        return operands[0]
    if kind not in _MANY:
        raise CaptureError(f"{source}: a branch on {expression} cannot be kept as a guard")
    result = operands[0]
    for operand in operands[1:]:
        result = (_MANY[kind], result, operand)
    return result
