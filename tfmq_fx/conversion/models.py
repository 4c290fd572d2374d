"""What users hold: prepared, converted and compiled models, called like the original model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tfmq_fx.backends.nonfinite import batched, is_finite, with_nan
from tfmq_fx.backends.self_check import Check
from tfmq_fx.calibration.observers import SampleCache
from tfmq_fx.calibration.sampling_pass import SamplingPass
from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.stages import stage_of
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.quant.bit_plan import BitPlan
from tfmq_fx.serialization.graph_json import from_json, to_json
from tfmq_fx.serialization.module_json import owner_of, tensors_of
from tfmq_fx.serialization.module_settings import Behaviour
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.removed_layers import install_removed
from tfmq_fx.serialization.staleness import StalenessCheck

from .graph_model import GraphModel


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
        position = self.call.timestep_position
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
        origin: Provenance | None = None,
        watch: StalenessCheck | None = None,
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

    def unbound(self) -> Converted:
        """The model without what binds it to a request: itself, where nothing does."""
        return self

    def bound_alike(self, model: Converted, timesteps: Any = None) -> Converted:
        """`model`, bound to requests as this one is: as it is, where nothing binds this one.

        timesteps: of the requests to come; left out, they are those of this one.
        """
        return model

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
    origin: Provenance | None,
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
