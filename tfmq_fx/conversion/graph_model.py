"""Call a graph like the model that it was captured from: the base of the classes users hold."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError, FrozenError, InputError, TfmqError
from tfmq_fx.ir.dtype_casts import cast_obstacle
from tfmq_fx.ir.graph import KEYS
from tfmq_fx.ir.held_values import checks_alone
from tfmq_fx.passes.correct_outputs import CORRECTION
from tfmq_fx.passes.quantize_layers import SCALES
from tfmq_fx.passes.quantize_products import SCALES as PRODUCT_SCALES
from tfmq_fx.quant.timestep_lookup import find_unknown
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.staleness import StalenessCheck

from .diffusers_form import DiffusersForm
from .other_forms import OtherForms, captured_in
from .source_outline import SourceOutline

T = TypeVar("T")

# names of the buffers that keep their dtype when the model is cast
_EXACT = (KEYS, SCALES, PRODUCT_SCALES, CORRECTION)


class ModelConfig(dict[str, Any]):
    """A saved model configuration that answers both config["key"] and config.key."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"the model's config has no {name!r}") from error


class GraphModel(DiffusersForm, nn.Module):
    """A graph called like the model it came from: same arguments, same output type.

    gm: the graph, open to inspection.  call: how arguments and outputs map to it.
    config: the original's `.config` (what diffusers pipelines read), or None.
    outline: answers for the original's other attributes, parts and methods, where it is known; an
    attribute that would have changed the original cannot be set (FrozenError).
    """

    gm: fx.GraphModule
    call: CallSpec
    model_config: Any
    outline: SourceOutline | None = None
    forms: OtherForms
    watch: StalenessCheck | None = None  # of the model that the graph was made from
    origin: Provenance | None = None  # what else it was made from
    recipe: Config
    _checks: tuple[fx.GraphModule, fx.GraphModule | None] | None = None  # of a graph's held values
    why_no_gradient = (
        "no gradient with respect to the timestep, whose values are read from a table. Detach it"
    )

    def __init__(
        self,
        gm: fx.GraphModule,
        call: CallSpec,
        model_config: Any = None,
        outline: SourceOutline | None = None,
    ) -> None:
        super().__init__()
        self.gm = gm
        self.call = call
        self.model_config = model_config
        self.outline = outline
        self.forms = OtherForms()
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            gm = self.__dict__.get("_modules", {}).get("gm")
            outline = self.__dict__.get("outline")
            if gm is not None and name in gm._modules:
                part = gm._modules[name]
                known = outline is not None and type(part) is nn.Module
                return outline.part(name, part) if outline is not None and known else part
            if outline is None or name.startswith("__"):
                raise
        try:
            return outline.get(name)
        except AttributeError:
            if isinstance(self.model_config, Mapping) and name in self.model_config:
                return self.model_config[name]
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        outline = self.__dict__.get("outline")
        if outline is not None and not (name in self.__dict__ or self._is_own(name)):
            outline.check_set(name, value)
        super().__setattr__(name, value)

    @classmethod
    def _is_own(cls, name: str) -> bool:
        """Whether models of this class have an attribute `name` of their own."""
        declared = (inspect.get_annotations(kind) for kind in cls.__mro__)
        return hasattr(cls, name) or any(name in names for names in declared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, in its own type.

        A call that the graph does not take (another size that its code fixes, another structure) is
        answered by a graph captured again from the source: see `other_forms`. Raises InputError
        where that is not possible, StaleError where the source has other weights since.
        """
        if torch.compiler.is_compiling():
            inputs, return_dict = self.call.bind(args, kwargs)
            return self.call.rebuild(self.run(inputs), return_dict)
        try:
            inputs, return_dict = self._bind(args, kwargs)
        except InputError as refusal:
            return self.forms.for_call(self, args, kwargs, refusal)(*args, **kwargs)
        if self.watch is not None:
            self.watch.check()
        self.check_timesteps(inputs)
        outputs = self.run(inputs)
        if torch.is_grad_enabled():
            names = self.without_gradient()
            lost = [v for n, v in zip(self.call.names, inputs, strict=True) if n in names]
            outputs = without_backward(outputs, lost, f"{', '.join(names)}: {self.why_no_gradient}")
        return self.call.rebuild(outputs, return_dict)

    def takes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the graph itself answers the call (*args, **kwargs)."""
        try:
            self._bind(tuple(args), dict(kwargs))
        except InputError:
            return False
        return True

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
        """The placeholder values for a call, and its return_dict; raises InputError where the graph
        does not take it, or holds a value that is another here."""
        inputs, return_dict = self.call.bind(args, kwargs)
        known = self._checks
        if known is None or known[0] is not self.gm:
            # no submodule: it shares the graph's tensors
            known = self.__dict__["_checks"] = (self.gm, checks_alone(self.gm))
        if known[1] is not None:
            known[1](*inputs)
        return inputs, return_dict

    def without_gradient(self) -> Sequence[str]:
        """The placeholders without a gradient: the timestep, where its values select table rows."""
        return () if self.lookup_keys is None else (self.call.timestep,)

    def run(self, inputs: list[Tensor]) -> Any:
        """The graph's flat outputs."""
        return self.gm(*inputs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, which a graph does not follow: it is captured in eval mode.

        Raises FrozenError where layers compute otherwise in training mode.
        """
        for path, layer in self.gm.named_modules() if mode else ():
            if (isinstance(layer, _DropoutNd) and layer.p) or isinstance(layer, _NormBase):
                raise FrozenError(
                    f"train(): {path} ({type(layer).__name__}) computes otherwise in training, and "
                    "the graph was captured in eval mode. Train the source, then capture it."
                )
        return super().train(mode)

    def forget_source(self) -> None:
        """Stop checking whether the source's weights have changed, and copy memory shared with it.

        Raises StaleError where they have changed already.
        """
        if self.watch is not None:
            self.watch.release(self.gm)
            self.watch = None

    def check_timesteps(self, inputs: list[Tensor]) -> None:
        """Raise InputError naming any timestep that the graph has no rows for."""
        if unknown := self.unknown_timesteps(inputs):
            raise InputError(
                f"{self.why_unknown(unknown[0])}. Prepare it again with timesteps= that include it "
                "(left out, it takes those that calibration visits), or set the scheduler as in "
                "calibration."
            )

    def unknown_timesteps(self, inputs: Sequence[Tensor]) -> list[int | float]:
        """The distinct timesteps of a call that the graph has no rows for, ascending."""
        keys = self.lookup_keys
        return [] if keys is None else find_unknown(keys, self.timestep_of(inputs))

    def why_unknown(self, step: float) -> str:
        """The beginning of an error message for a timestep that the graph has no rows for."""
        keys = self.timesteps
        assert keys is not None
        return (
            f"{self.call.timestep}: {step} is not among the {len(keys)} timesteps this model was "
            f"made for ({keys[0].item()} to {keys[-1].item()})"
        )

    def timestep_of(self, values: Sequence[T]) -> T:
        """The value of the timestep among the values of all placeholders."""
        return values[self.call.timestep_position]

    @property
    def timesteps(self) -> Tensor | None:
        """The timesteps (K,) the graph has rows for, sorted; None where they are not known yet."""
        keys = self.gm.meta.get("timesteps")
        return keys if isinstance(keys, Tensor) else None

    @property
    def lookup_keys(self) -> Tensor | None:
        """The timesteps (K,) that a call may have; None where all are allowed."""
        return self.timesteps

    @property
    def config(self) -> Any:
        """The original model's configuration."""
        return self.model_config

    @property
    def _internal_dict(self) -> Any:
        """The configuration under the name by which diffusers replaces it."""
        return self.model_config

    @_internal_dict.setter
    def _internal_dict(self, config: Any) -> None:
        self.model_config = config

    def register_to_config(self, **entries: Any) -> None:
        """Set entries of the configuration, which pipelines read; the graph does not."""
        kind = ModelConfig if self.model_config is None else type(self.model_config)
        self.model_config = kind({**(self.model_config or {}), **entries})

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
        return next((tensor.device for tensor in self.tensors()), torch.device("cpu"))

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter and buffer."""
        yield from self.parameters()
        yield from self.buffers()

    def nbytes(self) -> int:
        """Bytes of parameters and buffers in memory, tensors shared by two names counted once."""
        return sum({t.data_ptr(): t.nbytes for t in self.tensors()}.values())

    def cache_context(self, name: str, **options: Any) -> contextlib.AbstractContextManager[None]:
        """A context that does nothing; diffusers' pipelines enter it around each call."""
        return contextlib.nullcontext()

    @property
    def is_cache_enabled(self) -> bool:
        """No: diffusers' caches are hooks of the source's blocks, which a graph has not."""
        return False

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Nothing: there are no caches; diffusers' pipelines call it when they end."""

    def print_readable(self) -> None:
        """Print the graph as code, look-up nodes and quantized layers included."""
        self.gm.print_readable()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = (torch.device(self.call.inputs[0].device), self.dtype)  # of the graph's constants
        probe = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        if probe.dtype != self.dtype and (reason := self._cast_obstacle()):
            self.take_cast(probe.dtype, reason)
            self._move_outline(fn)
            super()._apply(lambda tensor: tensor.to(probe.device), recurse)
            return self
        exact = {n: b for n, b in self.gm.named_buffers(recurse=False) if n.startswith(_EXACT)}
        super()._apply(fn, recurse)
        self.__dict__["_checks"] = None
        for name, value in exact.items():  # .half() must touch neither keys nor scales
            setattr(self.gm, name, value.to(getattr(self.gm, name).device))
        if (probe.device, probe.dtype) != before:
            self.forms.clear()
            self._move_outline(fn)
            retarget(self.gm, before, (probe.device, probe.dtype))
            self.call = self.call.moved(device=probe.device.type, dtype=probe.dtype)
            if (keys := self.timesteps) is not None:
                self.gm.meta["timesteps"] = keys.to(probe.device)
        return self

    def _cast_obstacle(self) -> str | None:
        """Why a cast of the graph could differ from the graph of a cast model; None if nothing."""
        origin = getattr(self, "origin", None)
        beside: set[str] = set()
        if isinstance(origin, Provenance):
            beside = {*origin.fingerprints, *origin.constants} - set(origin.parameters)
        return cast_obstacle(self.gm, self.dtype, beside)

    def _move_outline(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.outline is not None:
            self.outline = self.outline.moved(fn)

    def take_cast(self, dtype: torch.dtype, reason: str) -> None:
        """Take the graph that the source has in `dtype`, where this one cannot be cast for
        `reason`. Raises ConfigError where that is not possible."""
        try:
            other = captured_in(self, dtype)
        except TfmqError as error:
            raise ConfigError(
                f"this model was captured in {self.dtype} and cannot be cast to {dtype}: {reason}, "
                f"and a graph does not tell whether the model itself would in {dtype}; nor can the "
                f"model be captured again in it ({error}). Cast the model and capture it: "
                f"model.to({dtype}), then prepare(), fold_timesteps() or bind_request() with "
                "inputs of that dtype."
            ) from error
        self.forms.clear()
        self.gm, self.call = other.gm, other.call


def retarget(
    gm: fx.GraphModule,
    before: tuple[torch.device, torch.dtype],
    after: tuple[torch.device, torch.dtype],
) -> None:
    """Replace the device and dtype `before` by `after` wherever the graph has them as constants."""

    def changed(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == before[0].type:
            return after[0]
        return after[1] if value is before[1] else value

    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.args = map_aggregate(node.args, changed)
            node.kwargs = map_aggregate(node.kwargs, changed)
    gm.recompile()


def without_backward(outputs: Sequence[Any], inputs: Sequence[Tensor], why: str) -> list[Any]:
    """`outputs`, whose backward raises InputError(why) where one of `inputs` needs a gradient."""
    leaves = [value for value in inputs if value.requires_grad]
    if not leaves:
        return list(outputs)
    return [
        _NoBackward.apply(why, value, *leaves)  # type: ignore[no-untyped-call]
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        else value
        for value in outputs
    ]


class _NoBackward(torch.autograd.Function):
    """Returns a tensor as it is, as a function of other tensors that has no gradient."""

    @staticmethod
    def forward(ctx: Any, why: str, value: Tensor, *leaves: Tensor) -> Tensor:
        ctx.why = why
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise InputError(ctx.why)
