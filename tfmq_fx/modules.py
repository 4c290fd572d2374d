"""What users hold: thin nn.Modules round a graph that are called like the original model."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from .backends.nonfinite import batched, is_finite, with_nan
from .backends.self_check import Check
from .behaviour import Behaviour
from .bit_plan import BitPlan
from .casts import cast_obstacle
from .config import Config, LayerConfig
from .dialect import stage_of
from .errors import ConfigError, InputError
from .gradients import refusing
from .graph import KEYS, Rewrite, timestep_node
from .graph_json import from_json, to_json
from .inference import outside_inference_mode
from .module_json import install_modules, module_json, owner_of, tensors_of
from .observers import SampleCache
from .ops import find_unknown
from .origin import Origin
from .passes.correct_outputs import CORRECTION
from .passes.quantize_layers import SCALES
from .passes.quantize_products import SCALES as PRODUCT_SCALES
from .pipelines import SamplingPass
from .signature import CallSpec
from .watch import SourceWatch

# buffers of the graph that keep their dtype in any model
_EXACT = (KEYS, SCALES, PRODUCT_SCALES, CORRECTION)


class ModelConfig(dict[str, Any]):
    """A saved model configuration that answers both config["key"] and config.key."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"the model's config has no {name!r}") from error


class Removed(nn.Module):
    """Stands where a look-up replaced a layer: answers what the layer was (`in_features`, `weight`
    on the meta device), holds no tensor of the model and cannot be called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple it is no submodule

    def __getattr__(self, name: str) -> Any:
        (layer,) = self.__dict__["_layer"]
        return getattr(layer, name)

    def extra_repr(self) -> str:
        return str(self._layer[0])


def removed_layers(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, Any]:
    """How to build each layer that `before` calls and `after` does not, by path; JSON-ready."""
    old, new = ({n.target for n in gm.graph.find_nodes(op="call_module")} for gm in (before, after))
    paths = sorted(str(target) for target in old - new)
    found = {path: module_json(before.get_submodule(path), path) for path in paths}
    return {path: entry for path, entry in found.items() if entry is not None}


def install_removed(gm: fx.GraphModule, table: Mapping[str, Any]) -> None:
    """Put a `Removed` in the place of each layer of `table`, which `removed_layers` made."""
    layers = nn.Module()
    install_modules(layers, dict(table))
    for path in table:
        gm.add_submodule(path, Removed(layers.get_submodule(path)))


class GraphModel(nn.Module):
    """A graph called like the model it came from: same arguments, same output type.

    gm: the graph, open to inspection.  call: how arguments and outputs map to it.
    config: the original's `.config` (what diffusers pipelines read), or None.
    """

    gm: fx.GraphModule
    watch: SourceWatch | None = None  # of the model that the graph was made from
    why_no_gradient = (
        "no gradient with respect to the timestep, whose values are read from a table. Detach it"
    )

    def __init__(self, gm: fx.GraphModule, call: CallSpec, model_config: Any = None) -> None:
        super().__init__()
        self.gm = gm
        self.call = call
        self.model_config = model_config
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            gm = self.__dict__.get("_modules", {}).get("gm")
            if gm is not None and name in gm._modules:
                return gm._modules[name]
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, in its own type. Raises InputError for a call not captured, and
        StaleError where the model that this one was made from has other weights since."""
        inputs, return_dict = self.call.bind(args, kwargs)
        if not torch.compiler.is_compiling():
            if self.watch is not None:
                self.watch.check()
            self.check_timesteps(inputs)
        outputs = self.run(inputs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            lost = self.without_gradient()
            given = [v for n, v in zip(self.call.names, inputs, strict=True) if n in lost]
            outputs = refusing(outputs, given, f"{', '.join(lost)}: {self.why_no_gradient}")
        return self.call.rebuild(outputs, return_dict)

    def without_gradient(self) -> Sequence[str]:
        """The placeholders with respect to which outputs have no gradient: a table is constant."""
        return () if self.lookup_keys is None else (self.call.timestep,)

    def run(self, inputs: list[Tensor]) -> Any:
        """The graph's flat outputs."""
        return self.gm(*inputs)

    def forget_source(self) -> None:
        """Go on with the weights as they are, whatever becomes of those that they were made from.

        Memory shared with the source is copied.  Raises StaleError where it has changed already.
        """
        if self.watch is not None:
            self.watch.release(self.gm)
            self.watch = None

    def check_timesteps(self, inputs: list[Tensor]) -> None:
        """Raise InputError naming any timestep that the graph has no rows for."""
        keys = self.lookup_keys
        if keys is None:
            return
        t = inputs[self.call.names.index(self.call.timestep)]
        if unknown := find_unknown(keys, t):
            raise InputError(
                f"{self.call.timestep}: {unknown[0]} is not among the {len(keys)} timesteps this "
                f"model was made for ({keys[0].item()} to {keys[-1].item()}). Prepare it again "
                "with timesteps= that include it (left out, it takes those that calibration "
                "visits), or set the scheduler as in calibration."
            )

    @property
    def timesteps(self) -> Tensor | None:
        """The finite set (K,) the graph has rows for, sorted; None before there is one."""
        keys = self.gm.meta.get("timesteps")
        return keys if isinstance(keys, Tensor) else None

    @property
    def lookup_keys(self) -> Tensor | None:
        """The timesteps (K,) that a call may bring; None where any will do."""
        return self.timesteps

    @property
    def config(self) -> Any:
        """The original model's configuration."""
        return self.model_config

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype the model computes in."""
        for spec in self.call.inputs:
            if spec.dtype.is_floating_point and spec.name != self.call.timestep:
                return spec.dtype
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The device the model lies on."""
        for tensor in self.tensors():
            return tensor.device
        return torch.device("cpu")

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter and buffer."""
        yield from self.parameters()
        yield from self.buffers()

    def nbytes(self) -> int:
        """Bytes of parameters and buffers in memory, tensors shared by two names counted once."""
        return sum({t.data_ptr(): t.nbytes for t in self.tensors()}.values())

    def cache_context(self, name: str, **options: Any) -> contextlib.AbstractContextManager[None]:
        """What diffusers' pipelines enter round a call; nothing is cached between calls here."""
        return contextlib.nullcontext()

    def print_readable(self) -> None:
        """Print the graph as code, look-up nodes and quantized layers included."""
        self.gm.print_readable()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = (self.device, self.dtype)
        probe = fn(torch.empty(0, dtype=before[1], device=before[0]))
        if probe.dtype != before[1]:
            self._check_cast(before[1], probe.dtype)
        exact = {n: b for n, b in self.gm.named_buffers(recurse=False) if n.startswith(_EXACT)}
        super()._apply(fn, recurse)
        for name, value in exact.items():  # .half() must touch neither keys nor scales
            setattr(self.gm, name, value.to(getattr(self.gm, name).device))
        if (probe.device, probe.dtype) != before:
            retarget(self.gm, before, (probe.device, probe.dtype))
            self.call = self.call.moved(device=probe.device.type, dtype=probe.dtype)
            if (keys := self.timesteps) is not None:
                self.gm.meta["timesteps"] = keys.to(probe.device)
        return self

    def _check_cast(self, old: torch.dtype, new: torch.dtype) -> None:
        """Raise ConfigError where the graph cannot be what the model would be in another dtype."""
        origin = getattr(self, "origin", None)
        beside: set[str] = set()
        if isinstance(origin, Origin):
            beside = {*origin.fingerprints, *origin.constants} - set(origin.parameters)
        if reason := cast_obstacle(self.gm, old, beside):
            raise ConfigError(
                f"this model was captured in {old} and cannot be cast to {new}: {reason}, and a "
                f"graph does not tell whether the model itself would in {new}. Cast the model and "
                f"capture it again: model.to({new}), then prepare(), fold_timesteps() or "
                "bind_request() with inputs of that dtype."
            )


def retarget(
    gm: fx.GraphModule,
    before: tuple[torch.device, torch.dtype],
    after: tuple[torch.device, torch.dtype],
) -> None:
    """Replace device and dtype constants of `before` in the graph by those of `after`."""

    def changed(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == before[0].type:
            return after[0]
        return after[1] if value is before[1] else value

    def walk(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(walk, value))
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return changed(value)

    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.args = walk(tuple(node.args))
            node.kwargs = walk(dict(node.kwargs))
    gm.recompile()


class Prepared(GraphModel):
    """A captured model that records ranges and sample inputs at each call, and answers as before.
    Its answers have no gradient.

    observed: the graph with observers, which runs.  gm: the captured graph, which `convert` takes.
    unmerged: the graph as it was captured, each repetition in its place; left out, `gm`.
    behaviour: how the source's modules behaved when it was captured.
    """

    why_no_gradient = (
        "a prepared model only observes and has no gradient. Call the model itself, or the "
        "converted one"
    )

    def __init__(
        self,
        captured: fx.GraphModule,
        observed: fx.GraphModule,
        call: CallSpec,
        *,
        recipe: Config,
        overrides: Mapping[str, LayerConfig],
        cache: SampleCache,
        source: nn.Module,
        model_config: Any = None,
        unmerged: fx.GraphModule | None = None,
        behaviour: Behaviour | None = None,
    ) -> None:
        super().__init__(captured, call, model_config)
        self.observed = observed
        self.recipe, self.overrides, self.cache = recipe, dict(overrides), cache
        self.sampling: SamplingPass | None = None  # the last calibration, to be run again
        # A tuple keeps modules out of this one's submodules and state_dict.
        self._source = (source,)
        self._unmerged = (captured if unmerged is None else unmerged,)
        self.behaviour = behaviour or {}

    @property
    def source(self) -> nn.Module:
        """The user's own model, untouched."""
        return self._source[0]

    @property
    def unmerged(self) -> fx.GraphModule:
        """The graph as it was captured."""
        return self._unmerged[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (probe.dtype, probe.device) != (self.dtype, self.device):
            raise ConfigError(
                f"a prepared model stays as it was captured, {self.dtype} on {self.device}; asked "
                f"for {probe.dtype} on {probe.device}. Move the model before prepare(), or the "
                "converted one."
            )
        return super()._apply(fn, recurse)

    @outside_inference_mode  # what is kept of this call is learnt from later
    def without_gradient(self) -> Sequence[str]:
        return self.call.names

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Any:
        position = self.call.names.index(self.call.timestep)
        if not len(inputs[position]):
            raise InputError("a call of a prepared model needs one sample at least, got none")
        outputs = self.observed(*inputs)
        self.cache.add(inputs, self.batched(), position)
        return outputs

    @property
    def fixed_batch(self) -> int | None:
        """The batch size of every call, where the graph was captured for one alone."""
        size = timestep_node(self.gm).meta["val"].shape[0]
        return size if isinstance(size, int) else None

    def batched(self) -> list[bool]:
        """Which placeholders carry the batch in dim 0."""
        batch = str(timestep_node(self.gm).meta["val"].shape[0])
        nodes = self.gm.graph.find_nodes(op="placeholder")
        shapes = [node.meta["val"].shape for node in nodes]
        return [len(shape) > 0 and str(shape[0]) == batch for shape in shapes]


class Converted(GraphModel):
    """A folded and quantized model in its canonical form: eager reference semantics, integer
    buffers, the graph open to inspection as `.gm`.

    recipe: the configuration it was made by.  record: JSON-ready facts for `report`.
    origin: all else that it was made from, for `refresh`, or None.  watch: whether the source still
    has its weights; copies watch it too, what is pickled or saved does not.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        call: CallSpec,
        *,
        recipe: Config,
        record: dict[str, Any],
        model_config: Any = None,
        origin: Origin | None = None,
        watch: SourceWatch | None = None,
    ) -> None:
        super().__init__(gm, call, model_config)
        self.recipe, self.record, self.origin, self.watch = recipe, record, origin, watch
        install_removed(gm, record.get("removed", {}))

    @property
    def bit_plan(self) -> BitPlan | None:
        """The bits chosen under a budget and what they were chosen from; None without one."""
        bits = self.record.get("bits")
        return None if bits is None else BitPlan.from_dict(bits)

    def __deepcopy__(self, memo: dict[int, Any]) -> Converted:
        gm = copy.deepcopy(self.gm, memo)
        gm.meta = dict(self.gm.meta)
        return Converted(
            gm,
            self.call,
            recipe=self.recipe,
            record=copy.deepcopy(self.record, memo),
            model_config=copy.deepcopy(self.model_config, memo),
            origin=self.origin,
            watch=self.watch,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # As it is saved: torch's own pickle of a graph traces it again and loses its metadata.
        origin = None if self.origin is None else self.origin.portable()
        settings = (self.call, self.recipe, self.record, self.model_config, origin)
        return _unpickled, (to_json(self.gm), tensors_of(self.gm), *settings)

    @property
    def runnable(self) -> fx.GraphModule:
        """The graph that a backend compiles."""
        return self.gm

    @property
    def feed(self) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """Makes what `runnable` takes from the placeholder values of a call; None: they are it."""
        return None

    def extra_repr(self) -> str:
        return f"stage={stage_of(self.gm).value}, recipe={self.recipe.name}"


def _unpickled(
    graph: dict[str, Any],
    tensors: dict[str, Tensor],
    call: CallSpec,
    recipe: Config,
    record: dict[str, Any],
    model_config: Any,
    origin: Origin | None,
) -> Converted:
    gm = from_json(graph)
    for name, value in tensors.items():  # those too that a state_dict leaves out
        owner, leaf = owner_of(gm, name)
        place: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        place[leaf] = value
    return Converted(
        gm, call, recipe=recipe, record=record, model_config=model_config, origin=origin
    )


class Compiled(GraphModel):
    """A converted model that runs on a backend. Called like the original; not saved itself (save
    the converted model and compile after loading).

    Its answers have no gradient, and say so when one is asked for: the converted model has one.

    On the CPU, NaN and Inf in an input are answered by the converted model, while that is in
    memory; after that, and on other devices, samples with NaN in an input are NaN as a whole.

    backend: its name.  lowered: how many layers run as integers.  declined: [layer, reason] of
    those that do not.  millis: of a call, by backend, where several were tried.  check: how near
    its answers were to the reference's, or None where they were not compared.
    """

    why_no_gradient = (
        "a compiled model is for inference and has no gradient. Call the converted model that it "
        "was compiled from, whose gradient passes straight through the rounding"
    )

    def __init__(
        self,
        converted: Converted,
        runner: Callable[..., Any],
        lowering: Rewrite,
        backend: str,
        *,
        millis: Mapping[str, float] | None = None,
        check: Check | None = None,
    ) -> None:
        super().__init__(lowering.gm, converted.call, converted.model_config)
        self.gm.meta["timesteps"] = converted.timesteps
        self.runner, self.backend, self.check = runner, backend, check
        self.millis = dict(millis or {})
        self.lowered = int(lowering.details.get("integer", 0))
        self.declined = [[d.site, d.reason] for d in lowering.declined]
        self.recipe, self.record, self.watch = converted.recipe, converted.record, converted.watch
        self._feed, self._lookup_keys = converted.feed, converted.lookup_keys
        self._reference = weakref.ref(converted)
        self._batched = batched(converted.gm)
        install_removed(self.gm, self.record.get("removed", {}))

    @property
    def lookup_keys(self) -> Tensor | None:
        return self._lookup_keys

    def without_gradient(self) -> Sequence[str]:
        return self.call.names

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Any:
        if self.backend == "eager":
            return self._run(inputs)
        if inputs[0].device.type != "cpu":  # to ask whether all is finite would wait for it
            return with_nan(self._run(inputs), inputs, self._batched)
        if is_finite(inputs):
            return self._run(inputs)
        if (reference := self._reference()) is not None:
            return reference.run(inputs)
        return with_nan(self._run(inputs), inputs, self._batched)

    def _run(self, inputs: list[Tensor]) -> Any:
        return self.runner(*(inputs if self._feed is None else self._feed(inputs)))

    def extra_repr(self) -> str:
        checked = "not compared" if self.check is None else str(self.check)
        return f"backend={self.backend}, {self.lowered} integer layers, to the reference: {checked}"
