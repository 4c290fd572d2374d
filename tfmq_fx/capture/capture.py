"""Capture an nn.Module as a flat graph, and prove by replay that the graph equals the model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import Proxy

from tfmq_fx.core.errors import CaptureError, InputError, StateError, TfmqError
from tfmq_fx.core.module_overrides import refuse_hooks
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import OPAQUE
from tfmq_fx.ir.graph_pass import prune
from tfmq_fx.ir.held_values import EXAMPLES
from tfmq_fx.ir.verifier import check

from .call_inference import Dynamic, describe_call
from .call_spec import CallSpec
from .data_dependence import Allowances, DataDependent
from .export_route import Exported, export
from .fake_values import SizeTest
from .free_sizes import held_sizes, less_batch, mixes_batch, sizes_of_rows, sizes_without
from .guards import guard, same_operations
from .input_checks import BATCH, plain_number
from .model_checks import check_model, check_names
from .nested_values import Branch, Const, Structure, outline
from .opaque_modules import remarks, trace_in_part
from .outside_tensors import BAKED, OUTSIDE
from .replay import arguments, model_error, replay, structural_clone
from .torch_patches import plain_transformers
from .tracer import ValueTracer

log = logging.getLogger(__name__)

_INEQUALITIES = ("StrictGreaterThan", "GreaterThan", "StrictLessThan", "LessThan")  # of sympy
_TRIES = 8  # up to this number, tests on sizes are turned round one by one


@dataclass(frozen=True)
class Captured:
    """A flat graph and how to call it like the model.

    route: "trace" or "export".  notes: remarks for a report.
    """

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
    placeholders, everything else is fixed.  timestep: the name of the timestep; the graph takes it
    as a tensor (batch,) of the example's dtype (int -> int64, float -> float32).
    dynamic: "batch" frees dim 0 of every input that has the sample's batch; "spatial" the last two
    dims of inputs with four or more dims that have the sample's, or the tokens (dim 1 of a sample
    (batch, tokens, channels)) wherever another input has as many in dim 0 or 1.  Or the free sizes
    by name: {"hidden_states": {0: "batch", 1: "tokens"}, "img_ids": {0: "tokens"}}.
    Parameters and buffers are shared with the model; modules are copies.
    The model is traced, or exported by torch.export and then traced; raises CaptureError with
    module and line where neither gives a graph that equals the model bit for bit.
    """
    check_model(model)
    start = time.perf_counter()
    refuse_hooks(model)
    with _evaluated(model), plain_transformers(model) as transformers:
        captured = _with_free_sizes(model, example_inputs, timestep, dynamic)
    if (refusal := _refusal(captured.call, example_inputs)) is not None:
        raise CaptureError(f"the graph would refuse the example itself: {refusal}") from refusal
    seconds = time.perf_counter() - start
    log.debug("captured %s in %.2f s", type(model).__name__, seconds)
    notes = (*captured.notes, *transformers, *_timestep_notes(captured.call))
    return dataclasses.replace(captured, seconds=seconds, notes=notes)


def _timestep_notes(call: CallSpec) -> list[str]:
    """What is special about the timestep."""
    if call.per_token is not None:
        return [
            f"{call.timestep_path} has a number for each token: nothing can be tabled, and ranges "
            "by timestep go by the largest of each sample"
        ]
    return [] if call.timestep_form else [f"{call.timestep_path} is one number for all samples"]


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put the model itself in eval mode while active.

    Capturing runs a copy, but a function that a module holds may call parts of the model itself.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _with_free_sizes(
    model: nn.Module, example_inputs: Mapping[str, Any], timestep: str, dynamic: Dynamic
) -> Captured:
    """The graph with the sizes free that `dynamic` names, unless the model's code fixes them.

    An input with as many rows as there are samples may have them for another reason. Then the graph
    holds the batch to the example's or mixes it, and fewer inputs are taken for batches.
    """
    call, examples = describe_call(model, example_inputs, timestep, dynamic)

    def attempt(free: Dynamic, form: tuple[int, ...] | None = None) -> Captured:
        described = describe_call(model, example_inputs, timestep, free, form)
        if captured is not None and OPAQUE in captured.gm.meta:
            return _in_part(model, *described)
        return _traced_or_exported(model, *described)

    def has_free_batch(captured: Captured) -> bool:
        return BATCH not in held_sizes(captured.call, examples) and not mixes_batch(captured.gm)

    refusal: CaptureError | None = None
    captured: Captured | None = None
    try:
        captured = _traced_or_exported(model, call, examples)
    except StateError:
        raise
    except CaptureError as error:
        if model_error(model, call, examples) is None:
            raise
        refusal = error
    holds = captured is not None and captured.gm.meta.get(EXAMPLES)  # of each sample, likely
    if not holds and (captured is None or not has_free_batch(captured)):
        for free in less_batch(call):
            with contextlib.suppress(CaptureError):
                if has_free_batch(other := attempt(free)):
                    captured = other
                    break
    no_row = captured is None or not has_free_batch(captured)
    if no_row and _is_number(example_inputs[timestep]):
        with contextlib.suppress(CaptureError):
            other = attempt(dynamic, ())
            captured = other if captured is None or has_free_batch(other) else captured
    if captured is None:
        assert refusal is not None
        raise refusal
    held = held_sizes(captured.call, examples)
    if BATCH not in held and _refusal(captured.call, example_inputs) is not None:
        held[BATCH] = "the model's code requires the example's batch"
    if not isinstance(dynamic, Mapping):  # what the user frees stays free, without tables
        for name in sizes_of_rows(captured.gm, captured.call) - held.keys():
            held[name] = "the time embedding has a row for each, of which tables need the number"
    if not held:
        return captured
    notes = [f"{name} is fixed: captured where {reason}" for name, reason in held.items()]
    fixed = attempt(sizes_without(captured.call, held), captured.call.timestep_form)
    call = dataclasses.replace(fixed.call, fixed=tuple(held.values()))
    return dataclasses.replace(fixed, call=call, notes=(*notes, *fixed.notes))


def _is_number(timestep: Any) -> bool:
    """Whether a timestep is a number or a 0-d tensor."""
    timestep = plain_number(timestep)
    return not isinstance(timestep, Tensor) or timestep.dim() == 0


def _refusal(call: CallSpec, example_inputs: Mapping[str, Any]) -> InputError | None:
    """The error with which the graph refuses its own example; None where it takes it."""
    try:
        call.bind((), dict(example_inputs))
    except InputError as error:
        return error
    return None


def _traced_or_exported(model: nn.Module, call: CallSpec, examples: list[Tensor]) -> Captured:
    """The graph from the tracer, or from torch.export where the tracer fails."""
    try:
        trace = _trace(model, call, examples)
        binding = _binding(model, call, examples, trace)
        gm, call, notes = _proved(model, call, examples, trace, binding)
        route = "trace"
    except StateError:
        raise
    except CaptureError as refusal:
        try:
            exported = _export(model, call, examples)
            trace = _trace(model, call, examples, exported=exported)
            binding = [*exported.tests, *trace.tests]
            gm, call, notes = _proved(model, call, examples, trace, binding)
        except CaptureError as error:
            refusal.add_note(f"torch.export does not help: {_first_line(error)}")
            if not isinstance(refusal, DataDependent):
                raise refusal from error
            try:
                return _in_part(model, call, examples)
            except CaptureError as last:
                if isinstance(last, StateError):
                    raise
                refusal.__notes__[-1] += (
                    f"; nor does leaving modules as they are: {_first_line(last)}"
                )
                raise refusal from last
        route, notes = "export", [f"captured by torch.export, since {_first_line(refusal)}", *notes]
    return Captured(gm, call, route, 0.0, tuple(notes))


def _in_part(model: nn.Module, call: CallSpec, examples: list[Tensor]) -> Captured:
    """The graph that leaves modules as they are whose code depends on data, and holds conditions.

    Raises CaptureError where there is none.
    """
    trace, allowed = trace_in_part(
        model, call, examples, lambda allowed: _trace(model, call, examples, allowed=allowed)
    )
    binding = _binding(model, call, examples, trace, allowed)
    gm, call, notes = _proved(model, call, examples, trace, binding)
    return Captured(gm, call, "trace", 0.0, (*remarks(gm), *notes))


def _proved(
    model: nn.Module,
    call: CallSpec,
    examples: list[Tensor],
    trace: _Trace,
    binding: list[SizeTest],
) -> tuple[fx.GraphModule, CallSpec, list[str]]:
    """The graph, how it is called, and notes; raises CaptureError unless it equals the model.

    binding: the tests on sizes that every call has to pass.
    """
    notes = [f"captured where {t.expression} is {t.held} ({t.source})" for t in binding]
    if idle := [f"{t.expression} ({t.source})" for t in trace.tests if t not in binding]:
        notes.append(
            f"{', '.join(idle)}: chooses a memory layout only; where its outcome is another than "
            f"here, the graph equals the model up to the order of float additions"
        )
    guards = tuple(guard(test) for test in binding)
    call = dataclasses.replace(call, output=trace.output, guards=guards)
    notes += replay(model, trace.gm, call, examples)
    return trace.gm, call, notes


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


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
    allowed: Allowances | None = None,
) -> _Trace:
    """Trace the model; tests in `forced` have the outcome that is stated there.

    exported: trace this form of the model in place of its code.  allowed: what may be kept of code
    that depends on data.
    """
    import sympy  # type: ignore[import-untyped]
    from torch._dynamo.source import ConstantSource  # takes longer to import than all of torch
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    clone = structural_clone(model)
    if exported is not None:
        exported.register(clone)
    # No sizes that depend on data: neither guards nor binding times could express them.
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    mode.cache_enabled = False  # with free sizes, a look-up takes longer than computing the result
    sizes: dict[str, Any] = {}
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    fakes: dict[str, Tensor] = {}
    for name, hint in call.sizes_of(examples).items():
        source = ConstantSource(name)
        symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[name] = shapes.create_symintnode(symbol, hint=hint, source=source)
        names[symbol] = sympy.Symbol(name, integer=True, positive=True)
    for spec, example in zip(call.inputs, examples, strict=True):
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        with mode:
            fakes[spec.name] = torch.empty(shape, dtype=spec.dtype, device=example.device)

    output: Structure = Const(None)
    samples = call.sizes_of(examples).get(BATCH, len(examples[call.timestep_position]))

    def run(proxies: list[Any]) -> tuple[Any, ...]:
        nonlocal output
        if exported is not None:
            output = exported.output
            return exported.run(tracer, clone, proxies)
        output, leaves = _flat(clone, call, proxies, samples)
        return leaves

    tracer = ValueTracer(clone, model, mode, fakes, run, names, forced or {}, allowed)
    try:
        graph = tracer.run()
        replaced = tracer.replaced
        if tracer.leaves_values() or replaced is not None:
            # A second run raises where the next call reads them.
            tracer = ValueTracer(clone, model, mode, fakes, run, names, forced or {}, allowed)
            try:
                graph = tracer.run()
            except StateError as error:
                raise (replaced or error) from error
    except TfmqError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{tracer.last}: tracing {type(model).__name__} failed: {type(error).__name__}: {error}"
        ) from error
    _check_output(output)
    check_names(graph)
    gm = fx.GraphModule(clone, graph, type(model).__name__)
    gm.eval()
    prune(gm.graph)
    gm.delete_all_unused_submodules()
    gm.recompile()
    gm.meta.update(stage=Stage.CAPTURED, timestep=call.timestep, conditions=list(call.conditions))
    outside = tracer.outside if exported is None else exported.constants
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    if allowed is not None:
        gm.meta[OPAQUE] = dict(allowed.opaque)
        gm.meta[EXAMPLES] = tracer.held
    gm.meta[BAKED] = sorted(tracer.baked)
    gm.meta[OUTSIDE] = {name: weakref.ref(v) for name, v in outside.items() if name in read}
    check(gm, Stage.CAPTURED)
    return _Trace(gm, output, tracer.tests)


def _flat(
    model: nn.Module, call: CallSpec, values: list[Any], samples: int
) -> tuple[Structure, tuple[Any, ...]]:
    """The structure of the model's output for tensors `values`, and the output's tensors."""
    kwargs = arguments(call, values, samples)
    if call.return_dict is not None:
        kwargs["return_dict"] = True
    # _call_impl: while tracing, __call__ is patched to trace submodules, and the root is none.
    output, leaves = outline(model._call_impl(**kwargs))
    return output, tuple(value for _, value in leaves)


def _export(model: nn.Module, call: CallSpec, examples: list[Tensor]) -> Exported:
    """The model in the form that torch.export gives it."""
    clone = structural_clone(model)
    samples = call.sizes_of(examples).get(BATCH, len(examples[call.timestep_position]))
    return export(
        clone,
        lambda *values: _flat(clone, call, list(values), samples),
        examples,
        [spec.shape for spec in call.inputs],
    )


def _binding(
    model: nn.Module,
    call: CallSpec,
    examples: list[Tensor],
    trace: _Trace,
    allowed: Allowances | None = None,
) -> list[SizeTest]:
    """The tests whose outcome changes the operations of the graph.

    diffusers tests batch >= 64 and numel > 2**31 only to call contiguous(), which changes no value.
    """

    def idle(tests: list[SizeTest]) -> bool:
        turned = {dataclasses.replace(test, held=True): not test.held for test in tests}
        try:
            other = _trace(model, call, examples, turned, allowed=allowed)
        except TfmqError:
            return False
        return other.output == trace.output and same_operations(trace.gm.graph, other.gm.graph)

    branches = [test for test in trace.tests if test.branch]
    # Tests that choose a memory layout compare with a large number; tracing again takes time.
    large = [test for test in branches if type(test.expression).__name__ in _INEQUALITIES]
    free = set(large) if large and idle(large) else set()
    if not free and 1 < len(large) <= _TRIES:
        free = {test for test in large if idle([test])}
    return [test for test in trace.tests if test not in free]


def _check_output(output: Structure) -> None:
    """Raise CaptureError where the output contains a size that varies."""
    if isinstance(output, Branch):
        for child in output.children:
            _check_output(child)
    elif isinstance(output, Const) and isinstance(output.value, (Proxy, torch.SymInt)):
        raise CaptureError("forward returns a size that varies; return tensors and constants only")
