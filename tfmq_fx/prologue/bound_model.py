"""Bind a converted model to requests: what timesteps and conditions fix is computed once a request,
and read at its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx

from tfmq_fx.conversion.models import Converted
from tfmq_fx.core.config import PrologueSpec
from tfmq_fx.core.config_json import to_dict
from tfmq_fx.ir.request_cut import has_lookups
from tfmq_fx.passes.split_prologue import split_prologue

from .prologue import Prologue
from .timestep_schedule import Schedule

_STEPS = 50  # of a request, where neither the settings nor tables have the number


class Bound(Converted):
    """A converted model split into a prologue, run for new conditions or timesteps, and a step.

    `gm` is the whole graph, as it is saved and verified; `step` and the parts of `prologue` are cut
    from it and share its modules.  Values are computed without gradients.
    """

    spec: PrologueSpec
    conditions: list[str]
    prologue: Prologue
    step: fx.GraphModule  # from inputs of the model and then values of the prologue to its outputs
    why_no_gradient = (
        "no gradient with respect to what a request fixes, whose values are kept. Detach it, or "
        "call model.unbound()"
    )

    def __init__(
        self, model: Converted, spec: PrologueSpec, schedule: Schedule | None = None
    ) -> None:
        super().__init__(model.gm, model.call, **model.settings())
        self.spec = spec
        self.conditions = model.call.named_conditions(spec.conditions)
        self._split(schedule)

    @property
    def runnable(self) -> fx.GraphModule:
        return self.step

    @property
    def feed(self) -> Callable[[list[Tensor]], list[Tensor]] | None:
        return self.prologue.step_inputs

    @property
    def lookup_keys(self) -> Tensor | None:
        return self.timesteps if has_lookups(self.step) else None

    def without_gradient(self) -> Sequence[str]:
        parts = [cache.part for cache in self.prologue.parts]
        stepped = (self.call.timestep,) if any(part.stepped for part in parts) else ()
        return (*stepped, *dict.fromkeys(name for part in parts for name in part.conditions))

    def run(self, inputs: list[Tensor]) -> Any:
        if torch.compiler.is_compiling():  # somebody compiles the whole: nothing may be kept
            return self.gm(*inputs)
        values = self.prologue.step_inputs(inputs)
        return self.unvisited.on(self.step)(*values)

    def prologue_settings(self) -> dict[str, Any] | None:
        return to_dict(self.spec)

    def set_timesteps(self, timesteps: Any) -> None:
        """Set the timesteps of the requests to come, and compute the values of current conditions.

        timesteps: an int N (0 to N - 1), values as the model receives them, a scheduler, which is
        followed from then on, or None for no schedule.
        """
        self.prologue.set_timesteps(timesteps)

    def resident_bytes(self) -> int:
        """Bytes on the model's device between steps: weights that are not offloaded, and cached
        values."""
        offloaded = self.prologue.offloaded
        away = offloaded.nbytes() if offloaded.is_away else 0
        return self.nbytes() - away + self.prologue.nbytes()

    def print_readable(self) -> None:
        """Print the prologue's graphs and the step's as code."""
        for cache in self.prologue.parts:
            part = cache.part
            when = "for each step" if part.stepped else "once"
            print(f"# computed {when} for {', '.join(part.conditions) or 'a schedule'}")
            part.graph.print_readable()
        print("# computed at every step")
        self.step.print_readable()

    def unbound(self) -> Converted:
        """The same model without a prologue; it shares all tensors with this one."""
        self.prologue.restore()
        return Converted(self.gm, self.call, **self.settings())

    def bound_alike(self, model: Converted, timesteps: Any = None) -> Bound:
        bound = Bound(model, self.spec, self.prologue.schedule)
        if timesteps is not None:
            bound.set_timesteps(timesteps)
        return bound

    def forget_source(self) -> None:
        if self.watch is not None:
            self.prologue.restore()
            super().forget_source()
            self._split(self.prologue.schedule)  # the parts hold what the graph held

    def _split(self, schedule: Schedule | None) -> None:
        known = self.timesteps
        steps = self.spec.steps or (_STEPS if known is None else len(known))
        split = split_prologue(self.gm, self.conditions, steps=steps)
        self.__dict__["step"] = split.step  # no submodule: its tensors are the graph's
        self.prologue = Prologue(self.gm, split, self.spec, self.call, schedule, self.unvisited)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.prologue.restore()
        super()._apply(fn, recurse)
        self._split(self.prologue.schedule)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        schedule = copy.deepcopy(self.prologue.schedule, memo)
        return Bound(copy.deepcopy(self.unbound(), memo), self.spec, schedule)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.unbound(), self.spec, self.prologue.schedule)

    def extra_repr(self) -> str:
        values = sum(len(cache.part.names) for cache in self.prologue.parts)
        return f"{super().extra_repr()}, prologue of {values} values"
