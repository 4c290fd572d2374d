"""Prepared, converted and compiled models, which users call like the original model."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tfmq_fx.backends.nonfinite import is_finite, with_nan
from tfmq_fx.backends.self_check import Check
from tfmq_fx.calibration.observers import RangeObserver, SampleCache
from tfmq_fx.calibration.sampling_pass import SamplingPass
from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ArtifactError, ConfigError, InputError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.stages import stage_of
from tfmq_fx.ir.graph import batched_inputs, timestep_node
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.held_values import checks_alone, without_checks
from tfmq_fx.quant.bit_plan import BitPlan
from tfmq_fx.serialization.graph_json import from_json, to_json
from tfmq_fx.serialization.module_json import owner_of, tensors_of
from tfmq_fx.serialization.module_settings import Behaviour
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.removed_layers import install_removed
from tfmq_fx.serialization.staleness import StalenessCheck

from .graph_model import GraphModel
from .source_outline import SourceOutline
from .unvisited_timesteps import UnvisitedTimesteps

_log = logging.getLogger(__name__)


class Prepared(GraphModel):
    """A captured model that records ranges and sample inputs at each call.

    Its outputs are those of the original, without a gradient.
    observed: the graph with observers, which runs.  gm: the graph that `convert` takes.
    source: the user's own model.  unmerged: the graph as it was captured, repetitions included.
    behaviour: the settings of the source's modules when it was captured.
    """

    source: nn.Module
    unmerged: fx.GraphModule
    observed: fx.GraphModule
    recipe: Config
    overrides: dict[str, LayerConfig]
    cache: SampleCache
    sampling: SamplingPass | None  # the last calibration, to be run again
    behaviour: Behaviour
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
        source: nn.Module,
        unmerged: fx.GraphModule | None = None,
        behaviour: Behaviour | None = None,
    ) -> None:
        config = getattr(source, "config", None)
        super().__init__(captured, call, config, SourceOutline.of(source))
        self.observed, self.recipe, self.overrides = observed, recipe, dict(overrides)
        spec = recipe.reconstruction
        self.cache = SampleCache(capacity=spec.cache, seed=spec.seed)
        self.sampling = None
        # In __dict__ these modules are no submodules, and so not in the state_dict.
        self.__dict__["source"] = source
        self.__dict__["unmerged"] = captured if unmerged is None else unmerged
        self.behaviour = behaviour or {}

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
        if not len(self.timestep_of(inputs)):
            raise InputError("a call of a prepared model needs one sample at least, got none")
        outputs = self.observed(*inputs)
        self.cache.add(inputs, self.batched(), self.call.timestep_position)
        return outputs

    def saved_form(self) -> Any:
        raise ArtifactError("a prepared model cannot be saved: calibrate and convert it first")

    def take_graph(self, other: Prepared) -> None:
        """Take the graph of `other`, the same model captured for another call, before anything was
        recorded."""
        self.gm, self.observed, self.call = other.gm, other.observed, other.call
        self.__dict__["unmerged"], self.behaviour = other.unmerged, other.behaviour

    def observers(self) -> list[RangeObserver]:
        """The observers of the layers' input ranges."""
        return [m for m in self.observed.modules() if isinstance(m, RangeObserver)]

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the graph was captured for; None where it is free."""
        size = timestep_node(self.gm).meta["val"].shape[0]
        return size if isinstance(size, int) else None

    def batched(self) -> list[bool]:
        """Whether each placeholder carries the batch in dim 0."""
        return batched_inputs(self.gm)


class Converted(GraphModel):
    """A folded and quantized model in its canonical form: eager reference semantics and integer
    buffers.

    gm: the graph, open to inspection.  recipe: its configuration.  record: JSON-ready facts for
    `report`.  origin: all else that `refresh` needs, or None.  watch: checks whether the source
    still has its weights; copies share it, pickled and saved models have none.  unvisited: rows for
    the timesteps of calls that the model was not made for.
    """

    recipe: Config
    record: dict[str, Any]
    origin: Provenance | None

    def __init__(
        self,
        gm: fx.GraphModule,
        call: CallSpec,
        *,
        recipe: Config,
        record: dict[str, Any],
        model_config: Any = None,
        outline: SourceOutline | None = None,
        origin: Provenance | None = None,
        watch: StalenessCheck | None = None,
    ) -> None:
        super().__init__(gm, call, model_config, outline)
        self.recipe, self.record, self.origin, self.watch = recipe, record, origin, watch
        self.unvisited = UnvisitedTimesteps(self)
        install_removed(gm, record.get("removed", {}))

    def check_timesteps(self, inputs: list[Tensor]) -> None:
        """Add rows for the timesteps that the graph has none for.

        Raises InputError, naming one, where they cannot be made.
        """
        if unknown := self.unknown_timesteps(inputs):
            self.unvisited.add(unknown)

    def run(self, inputs: list[Tensor]) -> Any:
        if torch.compiler.is_compiling():
            return self.gm(*inputs)
        return self.unvisited.on(self.gm)(*inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.unvisited.forget()
        return self

    @property
    def bit_plan(self) -> BitPlan | None:
        """The bits chosen under a budget and all candidates; None without a budget."""
        bits = self.record.get("bits")
        return None if bits is None else BitPlan.from_dict(bits)

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor besides the graph and its call."""
        names = ("recipe", "record", "model_config", "outline", "origin", "watch")
        return {name: getattr(self, name) for name in names}

    def __deepcopy__(self, memo: dict[int, Any]) -> Converted:
        gm = copy.deepcopy(self.gm, memo)
        gm.meta = dict(self.gm.meta)
        copied = copy.deepcopy({"record": self.record, "model_config": self.model_config}, memo)
        return Converted(gm, self.call, **self.settings() | copied)

    def __reduce__(self) -> tuple[Any, ...]:
        # As it is saved: torch's own pickle of a graph traces it again and loses its metadata.
        origin = None if self.origin is None else self.origin.portable()
        settings = self.settings() | {"origin": origin, "watch": None}
        return _unpickled, (to_json(self.gm), tensors_of(self.gm), self.call, settings)

    def unbound(self) -> Converted:
        """The model without a prologue: itself, where it has none."""
        return self

    def bound_alike(self, model: Converted, timesteps: Any = None) -> Converted:
        """`model`, bound to requests with the prologue settings of this one, if it has any.

        timesteps: the schedule of the requests; left out, the schedule stays.
        """
        return model

    def prologue_settings(self) -> dict[str, Any] | None:
        """The settings of a prologue, JSON-ready, where the model has one."""
        return None

    @property
    def runnable(self) -> fx.GraphModule:
        """The graph that a backend compiles, without checks of held values."""
        return without_checks(self.gm)

    @property
    def feed(self) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """Maps the placeholder values of a call to those of `runnable`; None: they are the same."""
        return None

    def extra_repr(self) -> str:
        return f"stage={stage_of(self.gm).value}, recipe={self.recipe.name}"


def _unpickled(
    graph: dict[str, Any], tensors: dict[str, Tensor], call: CallSpec, settings: dict[str, Any]
) -> Converted:
    gm = from_json(graph)
    for name, value in tensors.items():  # including those that a state_dict leaves out
        owner, leaf = owner_of(gm, name)
        place: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        place[leaf] = value
    return Converted(gm, call, **settings)


class Compiled(GraphModel):
    """A converted model that runs on a backend. `save` refuses it: save the converted model, and
    compile after loading; `save_pretrained` writes that one while it is in memory.

    Its outputs have no gradient, and raise where one is needed: the converted model has one.

    On the CPU, inputs with NaN and Inf are passed to the converted model while that is in memory;
    after that, and on other devices, samples with NaN in an input are NaN as a whole.  Timesteps
    that the model was not made for run on the converted model, too, which has or makes rows for
    them (one log line says so), and raise InputError where it is gone: keep a reference to it.

    backend: its name.  lowered: how many layers run as integers.  declined: [layer, reason] of the
    other layers.  millis: the time of a call by backend, where several were measured.  check: the
    comparison with the reference, or None.
    """

    recipe: Config
    record: dict[str, Any]
    runner: Callable[..., Any]
    backend: str
    check: Check | None
    options: dict[str, Any]  # of compile(), for another form of the model
    millis: dict[str, float]
    lowered: int
    declined: list[list[str]]
    _feed: Callable[[list[Tensor]], list[Tensor]] | None
    _lookup_keys: Tensor | None
    reference: weakref.ref[Converted]
    _batched: list[bool]
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
        super().__init__(lowering.gm, converted.call, converted.model_config, converted.outline)
        self.gm.meta["timesteps"] = converted.timesteps
        self.runner, self.backend, self.check = runner, backend, check
        self.options = {}
        self.millis = dict(millis or {})
        self.lowered = int(lowering.details.get("integer", 0))
        self.declined = [[d.site, d.reason] for d in lowering.declined]
        self.recipe, self.record, self.watch = converted.recipe, converted.record, converted.watch
        self.__dict__["_checks"] = (self.gm, checks_alone(converted.gm))
        self._feed, self._lookup_keys = converted.feed, converted.lookup_keys
        self.reference, self._handed_over = weakref.ref(converted), False
        self._batched = batched_inputs(converted.gm)
        install_removed(self.gm, self.record.get("removed", {}))

    @property
    def lookup_keys(self) -> Tensor | None:
        return self._lookup_keys

    def without_gradient(self) -> Sequence[str]:
        return self.call.names

    def check_timesteps(self, inputs: list[Tensor]) -> None:
        """Leave timesteps to `run`, which hands those without rows to the converted model."""

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Any:
        if not torch.compiler.is_compiling() and (unknown := self.unknown_timesteps(inputs)):
            return self._on_reference(inputs, unknown)
        if self.backend == "eager":
            return self._run(inputs)
        if inputs[0].device.type != "cpu":  # checking for NaN first would wait for the device
            return with_nan(self._run(inputs), inputs, self._batched)
        if is_finite(inputs):
            return self._run(inputs)
        if (reference := self.reference()) is not None:
            return reference.run(inputs)
        return with_nan(self._run(inputs), inputs, self._batched)

    def _on_reference(self, inputs: list[Tensor], unknown: Sequence[float]) -> Any:
        """The answer of the converted model.  Raises InputError where it is gone."""
        reference = self.reference()
        if reference is None:
            raise InputError(
                f"{self.why_unknown(unknown[0])}, and the converted model that could answer is "
                "gone: keep a reference to it, or make one with tfmq_fx.refresh(model, source, "
                "timesteps=...) and compile that."
            )
        if not self._handed_over:
            self._handed_over = True
            _log.warning(
                "timestep %s was not compiled: it, and others that the model was not made for, "
                "run on the converted model, which is slower. Compile what tfmq_fx.refresh(model, "
                "source, timesteps=...) makes to have them compiled",
                unknown[0],
            )
        reference.check_timesteps(inputs)
        return reference.run(inputs)

    def saved_form(self) -> Any:
        if (converted := self.reference()) is not None:
            return converted
        raise ArtifactError(
            "a compiled model is saved as the converted model that it was compiled from, which is "
            "no longer in memory. Keep it, or save it before compiling, and compile after loading"
        )

    def _run(self, inputs: list[Tensor]) -> Any:
        return self.runner(*(inputs if self._feed is None else self._feed(inputs)))

    def extra_repr(self) -> str:
        checked = "not compared" if self.check is None else str(self.check)
        return f"backend={self.backend}, {self.lowered} integer layers, to the reference: {checked}"
