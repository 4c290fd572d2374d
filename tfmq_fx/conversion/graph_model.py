"""A thin nn.Module round a graph, called like the original model: base of what users hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.ir.dtype_casts import cast_obstacle
from tfmq_fx.ir.graph import KEYS
from tfmq_fx.passes.correct_outputs import CORRECTION
from tfmq_fx.passes.quantize_layers import SCALES
from tfmq_fx.passes.quantize_products import SCALES as PRODUCT_SCALES
from tfmq_fx.quant.timestep_lookup import find_unknown
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.staleness import StalenessCheck

from .gradient_checks import refusing

# buffers of the graph that keep their dtype in any model
_EXACT = (KEYS, SCALES, PRODUCT_SCALES, CORRECTION)


class ModelConfig(dict[str, Any]):
    """A saved model configuration that answers both config["key"] and config.key."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"the model's config has no {name!r}") from error


class GraphModel(nn.Module):
    """A graph called like the model it came from: same arguments, same output type.

    gm: the graph, open to inspection.  call: how arguments and outputs map to it.
    config: the original's `.config` (what diffusers pipelines read), or None.
    """

    gm: fx.GraphModule
    watch: StalenessCheck | None = None  # of the model that the graph was made from
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
        t = inputs[self.call.timestep_position]
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
        if isinstance(origin, Provenance):
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
