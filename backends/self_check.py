"""Compare the outputs of a compiled model with those of the model itself, before it is used.

How is the bound found? A backend adds in another order, and in places in bfloat16. Values then
differ by little, but codes of those beside a boundary differ by one, which moves more codes of the
layers behind. How far that goes depends on the model, so it is measured on it:

- `nearby`: the power of what the output changes by where every value that a layer reads is moved by
  some units in its last place (`UNITS` of the dtype's, more than another order of sums does), and
  where the backend computes in bfloat16, by as much as that rounds. Two such draws differ by a few
  times each other, since few codes may move: four times is allowed.
- `apart`: the same where every value is moved by up to half a step before it is rounded: two
  roundings that have nothing in common, which is where any such chain of codes ends. In deep models
  one unit in the last place is enough to get there, so one and a half times this is all that is
  allowed. An eighth of it is always: in small models one code may move that did not in the other
  draw.

Both are of the middle timestep and, as shares of the output's power, taken for the first and the
last as well, four times as wide.

In deep models a fault of one layer may thus be below the noise of rounding. So kernels of this
package are looked at layer by layer first, where there is no such noise (`layer_check`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tfmq_fx.backends.cpu.attention import attention
from tfmq_fx.backends.layer_check import Alone, LayerByLayer, decibels, power
from tfmq_fx.ir.graph import device_of
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.timestep_lookup import timestep_row

from .float_layers import DequantizedLayer

UNITS = 8
CLIPPED = 1 / 4
_HALF = 2.0**-8  # of bfloat16: a rounding or two
_TF32 = 2.0**-10
_SHARE, _TIMES, _MOST, _ELSEWHERE = 1 / 8, 4.0, 1.5, 4.0
Runner = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class StepCheck:
    """The comparison at one timestep: SQNR of the worst output against the reference, and the least
    that is allowed, in dB."""

    timestep: float | None
    sqnr: float
    least: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Check:
    """The comparison of a backend with the reference.  notes: what could not be compared."""

    backend: str
    steps: tuple[StepCheck, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every timestep passed."""
        return all(step.passed for step in self.steps)

    def __str__(self) -> str:
        words = [
            f"t = {step.timestep:g}: " * (step.timestep is not None)
            + f"{step.sqnr:.1f} dB (at least {step.least:.1f})"
            for step in self.steps
        ]
        return "; ".join([*words, *self.notes])


class Reference:
    """The outputs of a graph at a few timesteps, computed when first needed.

    inputs: of a factor by which values of the sample and the conditions are multiplied, what the
    graph takes at each of `timesteps`; the middle one is measured closely. Where more than
    `CLIPPED` of what layers read there is beyond their range, smaller values are taken: all that
    is rounded to the end alike shows nothing.
    Costs a call of the graph for each timestep, one for `apart`, and one for each kind of backend
    that is compared: five in all for three timesteps and one backend. Layers with kernels of this
    package run on these once as well.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Callable[[float], Sequence[list[Tensor]]],
        timesteps: Sequence[float | None],
    ) -> None:
        self.gm, self.make_inputs = gm, inputs
        self.timesteps, self.middle = list(timesteps), len(timesteps) // 2
        self.wrong: dict[str, str] | None = None
        self.inputs: list[list[Tensor]] = []
        self.answers: list[list[Tensor]] = []
        self.apart: list[float] = []  # power, by output
        self.nearby: dict[Any, list[float]] = {}

    def wrong_layers(self, alone: Alone) -> dict[str, str]:
        """The layers whose kernels of this package are wrong, with how far off they are.

        alone: makes the kernel of a layer, or None where it has none.
        """
        if self.wrong is None:
            self.wrong = self._measure(alone)
        return self.wrong

    def _measure(self, alone: Alone | None) -> dict[str, str]:
        """Run the graph, and layers on their kernels if `alone` makes them; returns the wrong
        layers."""
        with torch.no_grad():
            for factor in (1.0, 1 / 4, 1 / 16):
                self.inputs = list(self.make_inputs(factor))
                run = LayerByLayer(self.gm, alone)
                middle = _outputs(run.run(*self.inputs[self.middle]))
                if run.clipped() <= CLIPPED:
                    break
            if not self.answers:
                self.answers = [
                    middle if i == self.middle else _outputs(self.gm(*values))
                    for i, values in enumerate(self.inputs)
                ]
                self.apart = self._moved(Apart(self.gm))
        return run.wrong

    def check(self, backend: str, runner: Runner, lowered: fx.GraphModule) -> Check:
        """Compare the outputs of `runner` with the reference.  lowered: the graph that it runs."""
        if not self.answers:
            self._measure(None)
        with torch.no_grad():
            bounds = self._bounds(lowered)
            outputs = [_outputs(runner(*values)) for values in self.inputs]
        steps, notes = [], []
        for i, step in enumerate(self.timesteps):
            wide = 1.0 if i == self.middle else _ELSEWHERE
            allowed = [wide * b for b in bounds]
            judged, note = _compared(step, self.answers[i], outputs[i], allowed)
            steps.append(judged)
            notes += note
        return Check(backend, tuple(steps), tuple(dict.fromkeys(notes)))

    def _bounds(self, lowered: fx.GraphModule) -> list[float]:
        """The power that the difference of each output may have, as a share of the output's
        power."""
        coarse = coarse_parts(lowered)
        if coarse not in self.nearby:
            self.nearby[coarse] = self._moved(Nearby(self.gm, *coarse))
        near = self.nearby[coarse]
        allowed = [
            min(_SHARE * a + _TIMES * n, max(_MOST * a, 2 * n))
            for a, n in zip(self.apart, near, strict=True)
        ]
        powers = [power(_finite(y)) for y in self.answers[self.middle]]
        return [
            a / p if p else (math.inf if a else 0.0) for a, p in zip(allowed, powers, strict=True)
        ]

    def _moved(self, moved: fx.Interpreter) -> list[float]:
        """The power of the change of each output when the graph is run by `moved`."""
        outputs = _outputs(moved.run(*self.inputs[self.middle]))
        return [
            power(_finite(y).double() - _finite(z).double())
            for y, z in zip(self.answers[self.middle], outputs, strict=True)
        ]


class Apart(fx.Interpreter):
    """Run a graph with every value moved by up to half a step before it is rounded."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.generator = torch.Generator().manual_seed(0)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, QuantLayer) and module.act_bits is not None:
            dithered = self._dithered(module, "input_codes", module.act_format == "fp8")
            return dithered(*args, **kwargs)
        if isinstance(module, QuantActivation):
            return self._dithered(module, "uniform", False)(*args, **kwargs)
        return super().call_module(target, args, kwargs)

    def _dithered(self, module: nn.Module, rounds: str, relative: bool) -> nn.Module:
        exact, dithered = getattr(module, rounds), copy.copy(module)

        def rounded(x: Tensor, scale: Tensor) -> Tensor:
            draw = _like(x, self.generator, torch.rand) - 0.5
            step = x.float().abs() / 8 if relative else scale  # fp8 has three bits after the first
            y: Tensor = exact(x.float() + step * draw, scale)
            return y

        object.__setattr__(dithered, rounds, rounded)
        return dithered


class Nearby(fx.Interpreter):
    """Run a graph with rounding noise like a backend's: on the inputs of modules, the results of
    attention, and all values in half precision.

    layers: those that read inputs in bfloat16, which they do not round further.  nodes: attention
    in bfloat16.  "" among them: everything is in bfloat16.
    """

    def __init__(self, gm: fx.GraphModule, layers: frozenset[str], nodes: frozenset[str]) -> None:
        super().__init__(gm)
        self.layers, self.nodes = layers, nodes
        self.generator = torch.Generator().manual_seed(0)
        cuda = device_of(gm).type == "cuda"
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        self.least = _TF32 if cuda and tf32 else 0.0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is F.scaled_dot_product_attention:
            return self._move(result, _HALF if {n.name, ""} & self.nodes else 0.0)
        if n.op in ("placeholder", "get_attr", "output") or n.target is timestep_row:
            return result
        if isinstance(result, Tensor) and result.is_floating_point():
            rounds = "" in self.nodes or torch.finfo(result.dtype).bits < 32
            by = _HALF if "" in self.nodes else 0.0
            if rounds and n.op == "call_module":
                return self._move(result, by)
            if rounds and self._is_fresh(n, result):  # in place, for what may be written to later
                result.copy_(self._move(result, by))
        return result

    def _is_fresh(self, n: fx.Node, result: Tensor) -> bool:
        """Whether the result of a node lies in new memory of its own."""
        arguments = tree_leaves(self.fetch_args_kwargs_from_env(n))
        memory = {v.untyped_storage().data_ptr() for v in arguments if isinstance(v, Tensor)}
        own = result.untyped_storage().data_ptr() not in memory
        return own and not any(s == 0 for s in result.stride())

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        coarse = target in self.layers or "" in self.layers
        args = tuple(self._move(x, _HALF if coarse else 0.0) for x in args[:1]) + args[1:]
        if coarse and isinstance(module, QuantLayer):
            x = args[0] if args else kwargs["input"]
            return module.apply_op(x, module.weight.to(x.dtype), module.bias)
        return module(*args, **kwargs)

    def _move(self, x: Any, by: float) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        eps = torch.finfo(x.dtype).eps
        by = max(by, self.least, min(UNITS * eps, _HALF) if eps < 1e-5 else eps / 2)
        return (x.float() * (1 + by * _like(x, self.generator, torch.randn))).to(x.dtype)


def coarse_parts(lowered: fx.GraphModule) -> tuple[frozenset[str], frozenset[str]]:
    """The layers, and the nodes of attention, that a lowered graph computes in bfloat16; "" stands
    for all of them."""
    if lowered.meta.get("precision") == "bf16":
        return frozenset([""]), frozenset([""])
    modules = lowered.named_modules()
    layers = {name for name, module in modules if isinstance(module, DequantizedLayer)}
    nodes = {n.name for n in lowered.graph.find_nodes(op="call_function", target=attention)}
    return frozenset(layers), frozenset(nodes)


def _compared(
    step: float | None, expected: list[Tensor], outputs: list[Tensor], shares: list[float]
) -> tuple[StepCheck, list[str]]:
    """Judge one timestep by its worst output; returns notes on what could not be compared too."""
    at = "" if step is None else f" at t = {step:g}"
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return StepCheck(step, -math.inf, math.inf, False), [f"other shapes of outputs{at}"]
    worst, notes = StepCheck(step, math.inf, math.inf, True), []
    margin = math.inf
    for i, (y, z, share) in enumerate(zip(expected, outputs, shares, strict=True)):
        known = y.isfinite()
        if not torch.equal(known, z.isfinite()):
            notes.append(f"output {i} is NaN or Inf{at} at other places than the reference's")
            return StepCheck(step, -math.inf, math.inf, False), notes
        if not known.all():
            notes.append(f"the reference's output {i} has NaN or Inf{at}: the rest is compared")
        size, error = power(_finite(y)), power(_finite(y).double() - _finite(z).double())
        passed, sqnr, least = error <= share * size, decibels(size, error), decibels(1.0, share)
        if not passed or sqnr - least <= margin:
            margin = sqnr - least
            worst = StepCheck(step, sqnr, least, passed)
        if not passed:
            break
    return worst, notes


def _outputs(result: Any) -> list[Tensor]:
    return [y for y in tree_leaves(result) if isinstance(y, Tensor)]


def _finite(y: Tensor) -> Tensor:
    return torch.where(y.isfinite(), y, torch.zeros_like(y))


def _like(x: Tensor, generator: torch.Generator, draw: Callable[..., Tensor]) -> Tensor:
    return draw(x.shape, generator=generator).to(x.device)
