"""One step of a conversion as a value, and a list of steps that can be checked and printed."""

from __future__ import annotations

import enum
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from tfmq_fx.core.errors import ConfigError, GraphError, TfmqError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.verifier import check

from .calibration_data import check_ranges, check_samples, check_sampling
from .job import Job


class Need(enum.Enum):
    """What a step reads of calibration; `convert` makes sure that it is there before it begins."""

    RANGES = "ranges"  # the lowest and highest input of each layer at each timestep
    SAMPLES = "samples"  # sample inputs of the model
    RESAMPLING = "resampling"  # a calibration that can be run again with another model


class Guarantee(enum.Enum):
    """How what a step makes compares with what it was given."""

    BIT_EXACT = "bit-exact"  # the same outputs, bit for bit, at batch size 1
    REASSOCIATION = "equal up to reassociation"  # the same sums of products, in another order
    MEASURED = "error measured"  # other outputs; the report has the error
    UNCHANGED = "reads only"  # measures or decides; the graph stays as it is


def never(job: Job) -> str | None:
    """No reason to leave a step out."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One named step of `convert`.

    name: an identifier, by which reports, checkpoints and `refresh` know the step.
    run: takes a Job and returns a new one; it never changes the one that it gets, nor its graph.
        For a graph pass: `lambda job: job.applied(my_pass(job.gm))`.
    skip: why the step is left out, or None. It is asked before the conversion begins and again
        when the step's turn comes, and must answer on what is known by then.
    needs: what the step reads of calibration.
    takes, gives: the stage of the graph before and after.
    guarantee, cost: what is promised of the outputs, and how long it takes, in words; printed.
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
        for name in ("run", "skip"):
            if not callable(getattr(self, name)):
                raise ConfigError(
                    f"step {self.name!r}: {name} must be a function of a Job, "
                    f"not {getattr(self, name)!r}"
                )
        kinds = {"takes": Stage, "gives": Stage, "guarantee": Guarantee, "cost": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(
                    f"step {self.name!r}: {name} must be a {kind.__name__}, "
                    f"not {getattr(self, name)!r}"
                )
        object.__setattr__(self, "needs", frozenset(self.needs))
        if wrong := [need for need in self.needs if not isinstance(need, Need)]:
            raise ConfigError(f"step {self.name!r}: needs holds {wrong[0]!r}, which is no Need")

    @property
    def summary(self) -> str:
        """The first sentence of the docstring of `run`."""
        text = inspect.getdoc(self.run) or ""
        return " ".join(text.split("\n\n")[0].split()).rstrip(".")

    def __call__(self, job: Job) -> Job:
        """The job after this step, whose graph is checked on the way in and out.

        Raises GraphError where the graph is not of the stage that the step takes or gives, or where
        the step changed the graph that it was given.
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
    """What an edit of a graph in place changes: its nodes, its modules, versions of its tensors."""
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
        """A list with `steps` in front of the step called `name`."""
        at = self.position(name)
        return Steps(*self[:at], *steps, *self[at:])

    def after(self, name: str, *steps: Step) -> Steps:
        """A list with `steps` behind the step called `name`."""
        at = self.position(name) + 1
        return Steps(*self[:at], *steps, *self[at:])

    def without(self, *names: str) -> Steps:
        """A list that lacks the steps called `names`."""
        for name in names:
            self.position(name)
        return Steps(*(step for step in self if step.name not in names))

    def replaced(self, name: str, step: Step) -> Steps:
        """A list with `step` in the place of the step called `name`."""
        at = self.position(name)
        return Steps(*self[:at], step, *self[at + 1 :])

    def position(self, name: str) -> int:
        """Where the step called `name` stands. Raises ConfigError where there is none."""
        for i, step in enumerate(self):
            if step.name == name:
                return i
        raise ConfigError(f"no step is called {name!r}; there are {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the steps, in order."""
        return tuple(step.name for step in self)

    def check(self, job: Job) -> None:
        """Make sure, before the long work, that the steps fit one another and the calibration.

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
