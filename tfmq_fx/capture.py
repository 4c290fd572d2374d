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
from .errors import CaptureError, ConfigError, StateError, TfmqError
from .exported import Exported, export
from .graph import prune
from .guards import guard, same_operations
from .replay import arguments, replay, structural_clone
from .signature import BATCH, Argument, CallSpec, Input
from .structure import Branch, Const, Leaf, Structure, outline, per_sample
from .tracer import SizeTest, ValueTracer

log = logging.getLogger(__name__)

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "time_cond", "noise_level")
_SPATIAL = "spatial"
_STEPWISE = ("residual", "block_samples")  # in the names of what a ControlNet adds at every step
_INEQUALITIES = (sympy.StrictGreaterThan, sympy.GreaterThan, sympy.StrictLessThan, sympy.LessThan)
_TRIES = 8  # tests on sizes tried one by one for whether they matter

Dynamic = Collection[str] | Mapping[str, Mapping[int, str]]


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
    dynamic: Dynamic = ("batch",),
) -> Captured:
    """The model's graph at Stage.CAPTURED, in eval mode; the model is not changed.

    example_inputs: by parameter name of forward; tensors, also inside dicts and lists, become
    placeholders, everything else is fixed.  timestep: which of them is the timestep; the graph
    takes it as a tensor (batch,) of the example's dtype (int -> int64, float -> float32).
    dynamic: "batch" frees dim 0 of every input that has the sample's batch; "spatial" the last two
    dims of inputs with four or more dims that have the sample's, or the tokens (dim 1 of a sample
    (batch, tokens, channels)) wherever another input has as many in dim 0 or 1.  Or exactly what is
    free, by name: {"hidden_states": {0: "batch", 1: "tokens"}, "img_ids": {0: "tokens"}}.
    Parameters and buffers are shared with the model; modules are copies.
    """
    start = time.perf_counter()
    if not isinstance(dynamic, Mapping) and (unknown := set(dynamic) - {BATCH, _SPATIAL}):
        raise ConfigError(f"dynamic: unknown {sorted(unknown)}; known are {BATCH}, {_SPATIAL}")
    call, examples = _describe_call(model, example_inputs, timestep, dynamic)
    try:
        trace = _trace(model, call, examples)
        binding = _binding(model, call, examples, trace)
        gm, call, notes = _proved(model, call, examples, trace, binding)
        route = "trace"
    except StateError:
        raise
    except CaptureError as refusal:
        try:
            trace = _export(model, call, examples)
            gm, call, notes = _proved(model, call, examples, trace, trace.tests)
        except CaptureError as error:
            refusal.add_note(f"torch.export does not help: {error}")
            raise refusal from error
        route, notes = "export", [f"captured by torch.export, since {_first_line(refusal)}", *notes]
    seconds = time.perf_counter() - start
    log.debug("captured %s in %.2f s", type(model).__name__, seconds)
    return Captured(gm, call, route, seconds, tuple(notes))


def _proved(
    model: nn.Module,
    call: CallSpec,
    examples: list[Tensor],
    trace: _Trace,
    binding: list[SizeTest],
) -> tuple[fx.GraphModule, CallSpec, list[str]]:
    """The graph, how it is called, and what to say about it; raises unless it equals the model.

    binding: those tests on sizes that every call has to pass."""
    notes = [f"captured where {t.expression} is {t.held} ({t.source})" for t in binding]
    if idle := [f"{t.expression} ({t.source})" for t in trace.tests if t not in binding]:
        notes.append(
            f"{', '.join(idle)}: chooses a memory layout only; where it comes out otherwise than "
            f"here, the graph equals the model up to the order of float additions"
        )
    guards = tuple(guard(test) for test in binding)
    call = dataclasses.replace(call, output=trace.output, guards=guards)
    notes += replay(model, trace.gm, call, examples)
    return trace.gm, call, notes


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _describe_call(
    model: nn.Module, example_inputs: Mapping[str, Any], timestep: str, dynamic: Dynamic
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
    at = paths.index(timestep)
    tensors = [value for _, value in leaves]
    sample = _sample(paths, tensors, at)
    rows = 0 if sample is None else tensors[sample].shape[0]
    tensors = _batched(tensors, at, sample, _frees_batch(dynamic))
    inputs = _inputs(paths, tensors, at, sample, dynamic)
    if sample is not None and inputs[sample].shape[0] == BATCH:
        declared = [
            dataclasses.replace(argument, structure=per_sample(argument.structure, rows))
            for argument in declared
        ]
    call = CallSpec(
        tuple(declared),
        inputs,
        inputs[at].name,
        Const(None),
        return_dict,
        conditions=_conditions(inputs, at, sample),
    )
    return call, tensors


def _conditions(inputs: tuple[Input, ...], timestep: int, sample: int | None) -> tuple[str, ...]:
    """The inputs that are fixed for a whole request, judged by name: all but the sample (the first
    argument, where it is a list), timesteps and what another network computes at every step."""
    others = [spec for i, spec in enumerate(inputs) if i != timestep]
    paths = [spec.path.split(".")[0] for spec in others]
    denoised = inputs[sample].path if sample is not None else next(iter(paths), "")
    return tuple(
        spec.name
        for spec, path in zip(others, paths, strict=True)
        if path != denoised
        and path not in TIMESTEP_NAMES
        and not any(word in path for word in _STEPWISE)
    )


def _frees_batch(dynamic: Dynamic) -> bool:
    if isinstance(dynamic, Mapping):
        return any(BATCH in sizes.values() for sizes in dynamic.values())
    return BATCH in dynamic


def _sample(paths: list[str], values: list[Any], timestep: int) -> int | None:
    """The input whose dim 0 is the batch: the first image-like one, else the one with most dims.

    Not an element of a list, where each sample is a tensor of its own."""
    found = {
        i: value
        for i, (path, value) in enumerate(zip(paths, values, strict=True))
        if i != timestep
        and isinstance(value, Tensor)
        and value.ndim
        and not re.search(r"\.\d+(\.|$)", path)
    }
    images = [i for i, value in found.items() if value.ndim >= 4]
    if images:
        return images[0]
    return max(found, key=lambda i: found[i].ndim, default=None)


def _batched(values: list[Any], timestep: int, sample: int | None, free: bool) -> list[Tensor]:
    """The example's tensors, a batch of one made two (torch fixes sizes of one), and the timestep
    made a tensor (batch,)."""
    t = values[timestep]
    if isinstance(t, bool) or not isinstance(t, (int, float, Tensor)):
        raise ConfigError(f"the timestep must be a number or a tensor, got {type(t).__name__}")
    if not isinstance(t, Tensor):
        t = torch.tensor(t, dtype=torch.int64 if isinstance(t, int) else torch.float32)
    batch = max(t.numel(), 1) if sample is None else values[sample].shape[0]
    if t.ndim > 1 or t.numel() not in (1, batch) or t.dtype == torch.bool:
        raise CaptureError(
            f"the timestep has shape {tuple(t.shape)} and {t.dtype}; expected one number for each "
            f"of the {batch} samples, or one for all"
        )
    if free and batch == 1 and sample is not None:
        batch = 2
        values = [v.repeat(2, *[1] * (v.ndim - 1)) if _rows(v) == 1 else v for v in values]
    tensors = [value.detach() if isinstance(value, Tensor) else value for value in values]
    device = t.device if sample is None else tensors[sample].device
    row = t.detach().reshape(-1).to(device)
    tensors[timestep] = row if len(row) == batch else row[:1].expand(batch).contiguous()
    return tensors


def _rows(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else None


def _inputs(
    paths: list[str], tensors: list[Tensor], timestep: int, sample: int | None, dynamic: Dynamic
) -> tuple[Input, ...]:
    free = (
        _named_sizes(paths, tensors, timestep, dynamic)
        if isinstance(dynamic, Mapping)
        else _usual_sizes(tensors, sample, dynamic)
    )
    inputs: list[Input] = []
    for path, tensor, sizes in zip(paths, tensors, free, strict=True):
        shape = tuple(sizes.get(i, size) for i, size in enumerate(tensor.shape))
        name = re.sub(r"\W", "_", path)
        if keyword.iskeyword(name) or name in {spec.name for spec in inputs}:
            name = f"{name}_{len(inputs)}"
        inputs.append(Input(name, path, shape, tensor.dtype, tensor.device.type))
    return tuple(inputs)


def _usual_sizes(
    tensors: list[Tensor], sample: int | None, dynamic: Collection[str]
) -> list[dict[int, str]]:
    """Dim -> name of the size, for each input, of the sizes that `dynamic` frees."""
    free: list[dict[int, str]] = [{} for _ in tensors]
    if sample is None:
        return free
    shape = tensors[sample].shape
    for sizes, tensor in zip(free, tensors, strict=True):
        if BATCH in dynamic and _rows(tensor) == shape[0]:
            sizes[0] = BATCH
        if _SPATIAL not in dynamic:
            continue
        if len(shape) >= 4:
            if tensor.ndim >= 4 and tensor.shape[-2:] == shape[-2:]:
                sizes |= {tensor.ndim - 2: "height", tensor.ndim - 1: "width"}
        elif len(shape) == 3:
            same = [i for i in range(min(tensor.ndim - 1, 2)) if tensor.shape[i] == shape[1]]
            sizes |= {i: "tokens" for i in same if i not in sizes}
    return free


def _named_sizes(
    paths: list[str], tensors: list[Tensor], timestep: int, dynamic: Mapping[str, Mapping[int, str]]
) -> list[dict[int, str]]:
    """As the user named them; the timestep has the batch of the others."""
    if unknown := [path for path in dynamic if path not in paths]:
        raise ConfigError(f"dynamic: no input {unknown[0]!r}; choose from {', '.join(paths)}")
    found: dict[str, int] = {}
    for path, sizes in dynamic.items():
        tensor = tensors[paths.index(path)]
        for dim, name in sizes.items():
            if not (0 <= dim < tensor.ndim and name.isidentifier()):
                raise ConfigError(f"dynamic: {path} {tuple(tensor.shape)} has no {dim}: {name!r}")
            size = found.setdefault(name, tensor.shape[dim])
            if size != tensor.shape[dim]:
                raise ConfigError(
                    f"dynamic: {name} is {size} in one input and {tensor.shape[dim]} in {path}"
                )
    free = [dict(dynamic.get(path, {})) for path in paths]
    if BATCH in found and tensors[timestep].shape[0] == found[BATCH]:
        free[timestep] = {0: BATCH}
    return free


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
    exported: Exported | None = None,
) -> _Trace:
    """Trace the model; tests in `forced` come out as given there instead of as they do.

    exported: trace this form of the model in place of its code.
    """
    clone = structural_clone(model)
    if exported is not None:
        exported.register(clone)
    # No sizes that come from data: neither guards nor binding times could speak of them.
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
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
    samples = examples[call.names.index(call.timestep)].shape[0]

    def run(proxies: list[Any]) -> tuple[Any, ...]:
        nonlocal output
        if exported is not None:
            output = exported.output
            return exported.run(tracer, clone, proxies)
        output, leaves = _flat(clone, call, proxies, samples)
        return leaves

    tracer = ValueTracer(clone, mode, fakes, run, names, forced or {})
    try:
        graph = tracer.run()
        if tracer.leaves_values():  # does the next call read them?
            tracer = ValueTracer(clone, mode, fakes, run, names, forced or {})
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
    prune(gm.graph)
    gm.delete_all_unused_submodules()
    gm.recompile()
    gm.meta.update(stage=Stage.CAPTURED, timestep=call.timestep, conditions=list(call.conditions))
    check(gm, Stage.CAPTURED)
    return _Trace(gm, output, tracer.tests)


def _flat(
    model: nn.Module, call: CallSpec, values: list[Any], samples: int
) -> tuple[Structure, tuple[Any, ...]]:
    """Call the model; the structure of its output, and its tensors."""
    kwargs = arguments(call, values, samples)
    if call.return_dict is not None:
        kwargs["return_dict"] = True
    # _call_impl: while tracing, __call__ is patched to trace submodules, and the root is none.
    output, leaves = outline(model._call_impl(**kwargs))
    return output, tuple(value for _, value in leaves)


def _export(model: nn.Module, call: CallSpec, examples: list[Tensor]) -> _Trace:
    """The graph by way of torch.export, for a model that the tracer refused."""
    clone = structural_clone(model)
    samples = examples[call.names.index(call.timestep)].shape[0]
    exported = export(
        clone,
        lambda *values: _flat(clone, call, list(values), samples),
        examples,
        [spec.shape for spec in call.inputs],
    )
    trace = _trace(model, call, examples, exported=exported)
    return _Trace(trace.gm, trace.output, [*exported.tests, *trace.tests])


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
    # Those that choose a memory layout ask whether something is large; tracing again takes time.
    large = [test for test in branches if isinstance(test.expression, _INEQUALITIES)]
    free = set(large) if large and idle(large) else set()
    if not free and 1 < len(large) <= _TRIES:
        free = {test for test in large if idle([test])}
    return [test for test in trace.tests if test not in free]


def _check_output(output: Structure) -> None:
    if isinstance(output, Branch):
        for child in output.children:
            _check_output(child)
    elif isinstance(output, Const) and isinstance(output.value, (Proxy, torch.SymInt)):
        raise CaptureError("forward returns a size that varies; return tensors and constants only")
