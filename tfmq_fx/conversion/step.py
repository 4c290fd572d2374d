"""Describe a step of a conversion, and check and print a list of steps."""

from __future__ import annotations

import enum
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from tfmq_fx.core.errors import ConfigError, GraphError, TfmqError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.verifier import check

from .calibration_data import check_ranges, check_samples, check_sampling
from .job import Job


class Need(enum.Enum):
    """The calibration data that a step reads; `convert` checks that it is there beforehand."""

    RANGES = "ranges"  # the lowest and highest input of each layer at each timestep
    SAMPLES = "samples"  # sample inputs of the model
    RESAMPLING = "resampling"  # a calibration that can be run again with another model


class Guarantee(enum.Enum):
    """How the outputs of the graph after a step compare with those before it."""

    BIT_EXACT = "bit-exact"  # the same outputs, bit for bit, at batch size 1
    REASSOCIATION = "equal up to reassociation"  # the same sums of products, in another order
    MEASURED = "error measured"  # other outputs; the report has the error
    UNCHANGED = "reads only"  # measures or decides; the graph stays as it is


def never(job: Job) -> str | None:
    """Return no reason to leave a step out."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One named step of `convert`.

    name: an identifier, by which reports, checkpoints and `refresh` know the step.
    run: takes a Job and returns a new one; it never changes its argument, nor the graph in it.
        For a graph pass: `lambda job: job.applied(my_pass(job.gm))`.
    skip: returns why the step is left out, or None. It is called before the conversion begins and
        again when the step's turn comes, and must work with what the Job has by then.
    needs: the calibration data that the step reads.
    takes, gives: the stage of the graph before and after.
    guarantee, cost: how exact the outputs are, and how long the step takes, in words; printed.
    """

    name: str
    run: Callable[[Job], Job]
    takes: Stage
    gives: Stage
    guarantee: Guarantee
    cost: str
    skip: Callable[[Job], str | None] = never
    needs: frozenset[Need] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(f"Step.name must be an identifier such as 'clip', not {self.name!r}")
        kinds: dict[str, tuple[Any, str]] = {
            "run": (Callable, "function of a Job"),
            "skip": (Callable, "function of a Job"),
            "takes": (Stage, "Stage"),
            "gives": (Stage, "Stage"),
            "guarantee": (Guarantee, "Guarantee"),
            "cost": (str, "str"),
        }
        for name, (kind, noun) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ConfigError(f"step {self.name!r}: {name} must be a {noun}, not {value!r}")
        object.__setattr__(self, "needs", frozenset(self.needs))
        if wrong := [need for need in self.needs if not isinstance(need, Need)]:
            raise ConfigError(f"step {self.name!r}: needs holds {wrong[0]!r}, which is no Need")

    @property
    def summary(self) -> str:
        """The first sentence of the docstring of `run`."""
        text = inspect.getdoc(self.run) or ""
        return " ".join(text.split("\n\n")[0].split()).rstrip(".")

    def __call__(self, job: Job) -> Job:
        """The job after this step, with checks of the graph before and after it.

        Raises GraphError where a graph is not of the stage that the step takes or gives, or where
        the step changed the graph of its argument.
        """
        check(job.gm, self.takes)
        before = _state(job.gm)
        try:
            result = self.run(job)
        except TfmqError as error:
            error.add_note(f"in step {self.name}")
            raise
        if not isinstance(result, Job):
            raise GraphError(
                f"step {self.name!r} returned a {type(result).__name__} instead of a Job; for a "
                "graph pass return job.applied(my_pass(job.gm))"
            )
        if _state(job.gm) != before:
            raise GraphError(
                f"step {self.name!r} changed the graph that it was given; edit a copy, as "
                "functions under @graph_pass do"
            )
        check(result.gm, self.gives)
        return result


def _state(gm: fx.GraphModule) -> object:
    """The nodes, modules and tensor versions of a graph, which an edit in place changes."""
    tensors = itertools.chain(gm.named_parameters(), gm.named_buffers())
    versions = {n: (id(t), 0 if t.is_inference() else t._version) for n, t in tensors}
    modules = {name: id(module) for name, module in gm.named_modules()}
    return stage_of(gm), str(gm.graph), modules, versions


class Steps(tuple[Step, ...]):
    """Steps in the order in which they run. `print` shows them as a table."""

    def __new__(cls, *steps: Step) -> Steps:
        names = [step.name for step in steps]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two steps are called {doubled[0]!r}; give each a name of its own")
        return super().__new__(cls, steps)

    def before(self, name: str, *steps: Step) -> Steps:
        """The steps with `steps` in front of the step called `name`."""
        at = self.position(name)
        return Steps(*self[:at], *steps, *self[at:])

    def after(self, name: str, *steps: Step) -> Steps:
        """The steps with `steps` behind the step called `name`."""
        at = self.position(name) + 1
        return Steps(*self[:at], *steps, *self[at:])

    def without(self, *names: str) -> Steps:
        """The steps but for those called `names`."""
        for name in names:
            self.position(name)
        return Steps(*(step for step in self if step.name not in names))

    def replaced(self, name: str, step: Step) -> Steps:
        """The steps with `step` in the place of the step called `name`."""
        at = self.position(name)
        return Steps(*self[:at], step, *self[at + 1 :])

    def position(self, name: str) -> int:
        """The index of the step called `name`. Raises ConfigError where there is none."""
        if name not in self.names:
            raise ConfigError(f"no step is called {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the steps, in order."""
        return tuple(step.name for step in self)

    def check(self, job: Job) -> None:
        """Check, before the long work, that the steps fit one another and the calibration.

        Raises ConfigError where a step takes another stage than the one before it gives, or the
        last does not give a quantized graph; CalibrationError where what a step needs is missing.
        """
        stage, last = stage_of(job.gm), "the captured graph"
        active = [step for step in self if step.skip(job) is None]
        for step in active:
            if step.takes is not stage:
                raise ConfigError(
                    f"step {step.name!r} takes a {step.takes.value} graph, but after {last} it is "
                    f"{stage.value}; put it where print(tfmq_fx.STEPS) shows that stage"
                )
            stage, last = step.gives, f"step {step.name!r}"
        if stage is not Stage.QUANTIZED:
            raise ConfigError(
                f"the steps end with a {stage.value} graph, where a converted model's is "
                "quantized; keep the step 'quantize_layers'"
            )
        for step in active:
            if Need.RESAMPLING in step.needs:
                check_sampling(job.prepared, step.name)
        needs = {need for step in active for need in step.needs}
        if Need.RANGES in needs:
            check_ranges(job.prepared, job.sites, job.plan)
        if Need.SAMPLES in needs:
            check_samples(job.prepared.cache)

    def __repr__(self) -> str:
        return f"Steps({', '.join(self.names)})"

    def __str__(self) -> str:
        rows = [("step", "what it does", "graph", "guarantee", "cost"), ("---",) * 5]
        for step in self:
            graph = (
                step.gives.value
                if step.takes is step.gives
                else f"{step.takes.value} -> {step.gives.value}"
            )
            rows.append((f"`{step.name}`", step.summary, graph, step.guarantee.value, step.cost))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
