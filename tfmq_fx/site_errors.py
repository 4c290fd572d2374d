"""Each quantized layer of a model, judged alone on its reference's own inputs.

A layer is compared with itself quantized again, at the same bits, from the reference's weight and
for the reference's inputs: what that does not explain is no matter of bits.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from .dataflow import Binding, binding_times
from .drawn_inputs import Example
from .fixes import (
    Fix,
    Ranges,
    float_layer,
    float_weights,
    requantized,
    with_layers,
)
from .nn import QuantLayer
from .noise import decibels, energies, pooled
from .ops import timestep_index
from .site_parts import Leaf, SitePart, find_parts
from .spill import Spill
from .walk import Walk

FAR = 10.0  # dB, ten times the noise power
CLIPPED = 10.0  # dB of the input's own rounding; static ranges for all timesteps explain 4
OFF = math.sqrt(2)  # a ratio between right and off by two; weights of 2 bits have 0.86
_FEW = 3  # layers that a median needs
_MEMORY = 1 << 30  # bytes of the reference's values that wait in memory, more in files
_SEARCH = 8  # candidates of clipped weight ranges: 80 would gain a few tenths of a dB
_REBUILT = 1e-3  # relative error of a layer rebuilt in floating point that reassociation may leave


@dataclass(frozen=True, slots=True)
class SiteError:
    """What one layer loses on the reference's inputs.

    found: SQNR in dB of each sample, (E,).  pooled: of all of them together.
    excess: how many dB more of noise there is than when quantized again, at the sample where it is
    least; on the model's own inputs, where it is less there: a layer may have been rounded to make
    up for errors before it.  input_excess: where only inputs are rounded, the reference's.
    weight_ratio: size of the weight along the reference's.  input_ratio: of the input scale to that
    of the layer quantized again, over what this is in the other layers, as calibration sees more
    data than is looked at here.  Both of the leaf where they are furthest from 1.
    ranges: of what its leaves read.  rebuilt: whether its weight in floating point is known; `note`
    says why not.
    """

    part: SitePart
    found: Tensor
    pooled: float
    excess: float = 0.0
    input_excess: float = 0.0
    weight_ratio: float = 1.0
    input_ratio: float = 1.0
    ranges: Ranges = field(default_factory=dict)
    rebuilt: bool = False
    note: str = ""

    @property
    def worst(self) -> int:
        """The sample that comes out worst; NaN is worse than all."""
        return int(self.found.nan_to_num(nan=-math.inf).argmin())

    @property
    def broken(self) -> bool:
        """Whether the layer is further off than its bits explain."""
        sound = 1 / OFF < self.weight_ratio < OFF
        return not sound or self.excess > FAR or self.input_excess > CLIPPED

    @property
    def suspect(self) -> bool:
        """Whether its input is ranged otherwise than those of the other layers; that may be right,
        where inputs of the model spread more than those looked at."""
        return not 1 / OFF < self.input_ratio < OFF

    @property
    def remarks(self) -> list[str]:
        """What is wrong with it, in words."""
        found = [self.note] if self.note else []
        if not 1 / OFF < self.weight_ratio < OFF:
            found.append(f"its weight is {self.weight_ratio:.2g} times the reference's")
        if self.suspect:
            found.append(f"its input range is {self.input_ratio:.2g} times those of other layers")
        return found


def site_errors(
    reference: fx.GraphModule,
    model: fx.GraphModule,
    examples: Sequence[Example],
    timesteps: Tensor,
    *,
    drawn: Collection[str] = (),
) -> list[SiteError]:
    """Every quantized layer, in execution order; the reference runs once.

    examples: placeholder values, of any batch size.  timesteps: (K,), the model's set.  drawn:
    conditions among them that were drawn from no data; a layer that reads nothing else but the
    timestep is not judged by its input ranges.
    """
    parts = find_parts(reference, model)
    times = binding_times(reference, reference.meta.get("conditions", ()))
    placeholders = [str(n.target) for n in reference.graph.find_nodes(op="placeholder")]
    position = placeholders.index(reference.meta["timestep"])
    steps = [timestep_index(timesteps, values[position]).tolist() for values in examples]
    tables = dict(model.named_buffers())
    result, doubtful = list[SiteError](), dict[str, _Trial]()
    last = {node: part.name for part in parts for node in (part.target, *part.given)}
    with Spill(_MEMORY) as spill:
        full = Walk(reference, examples, spill=spill)
        full.keep(last)
        for part in parts:
            needed = (part.target, *part.given)
            full.run_past(needed)
            values = [[full.values[node][i] for node in needed] for i in range(len(examples))]
            early = times[part.target] is not Binding.X
            trusted = not (early and times.deps[part.target] & set(drawn))
            trial = _Trial(part, values, steps)
            result.append(_judged(trial, tables, trusted))
            if result[-1].excess > FAR:
                doubtful[part.name] = trial
            full.release(node for node in needed if last[node] == part.name)
    result = _seen_in_place(result, doubtful, model, examples)
    ranged = [e for e in result if e.input_ratio != 1.0]  # the others read floats, or no data
    ratios = [each.input_ratio for each in ranged if each.input_ratio > 0]
    middle = statistics.median(ratios) if len(ratios) >= _FEW else 1.0
    return [
        each if each.input_ratio == 1.0 else replace(each, input_ratio=each.input_ratio / middle)
        for each in result
    ]


class _Trial:
    """The part of one layer, run on the reference's values with changes.

    values: for each example the reference's value and the part's inputs.  steps: position in the
    set of timesteps of each of its samples.
    """

    def __init__(
        self, part: SitePart, values: Sequence[Sequence[Tensor]], steps: Sequence[Sequence[int]]
    ) -> None:
        self.part, self.values, self.steps = part, values, steps

    @torch.no_grad()
    def run(self, fix: Fix, stop: int | None = None) -> list[tuple[Tensor, ...]]:
        """For each example (up to `stop`) the value, and what each leaf reads."""
        gm = fx.GraphModule(self.part.part, self.part.part.graph)
        fix.apply_(gm)
        return [gm(*inputs) for _, *inputs in self.values[:stop]]

    def energy(self, outputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """`energies` (2, samples) of all examples."""
        pairs = zip(self.values, outputs, self.steps, strict=False)  # of as many as were run
        return torch.cat([energies(v[0], out[0], len(s)) for v, out, s in pairs], 1)

    def noise(self, fix: Fix) -> Tensor:
        """SQNR in dB of each sample, (E,)."""
        return decibels(self.energy(self.run(fix)))

    def ranges(self, outputs: Sequence[tuple[Tensor, ...]]) -> Ranges:
        """What each leaf read, by path and position in the set."""
        found: dict[str, dict[int, tuple[float, float]]] = {}
        for i, leaf in enumerate(self.part.leaves, start=1):
            seen = found.setdefault(leaf.path, {})
            for out, steps in zip(outputs, self.steps, strict=True):
                batched = out[i].shape[0] % len(steps) == 0
                rows = out[i].reshape(len(steps) if batched else 1, -1).expand(len(steps), -1)
                ends = zip(steps, rows.amin(1).tolist(), rows.amax(1).tolist(), strict=True)
                for step, low, high in ends:
                    a, b = seen.get(step, (low, high))
                    seen[step] = (min(a, low), max(b, high))
        return found


def _judged(trial: _Trial, tables: Mapping[str, Tensor], trusted: bool) -> SiteError:
    """What one layer loses.  trusted: whether its inputs are what it is used on."""
    part, leaves = trial.part, trial.part.leaves
    outputs = trial.run(Fix())
    energy = trial.energy(outputs)
    found, whole = decibels(energy), pooled(energy)
    if reason := _unknown(trial):
        return SiteError(part, found, whole, note=reason)
    if not leaves:
        return SiteError(part, found, whole)
    ranges = trial.ranges(outputs)
    again = requantized(leaves, ranges, tables, search=_SEARCH)
    renewed = with_layers(leaves, again)
    ratio = _furthest(_weight_ratio(leaf) for leaf in leaves)
    if not trusted:
        note = "it reads a condition drawn at random: only its weights are judged"
        return SiteError(
            part, found, whole, weight_ratio=ratio, ranges=ranges, rebuilt=True, note=note
        )
    by_input = float_weights(leaves), Fix(float_weights(renewed).modules, again.columns)
    return SiteError(
        part,
        found,
        whole,
        excess=_excess(found, trial.noise(again)),
        input_excess=_excess(*map(trial.noise, by_input)),
        weight_ratio=ratio,
        input_ratio=_furthest(map(functools.partial(_input_ratio, tables, again), leaves)),
        ranges=ranges,
        rebuilt=True,
    )


def _seen_in_place(
    errors: Sequence[SiteError],
    doubtful: Mapping[str, _Trial],
    model: fx.GraphModule,
    examples: Sequence[Example],
) -> list[SiteError]:
    """The errors, with the excess of doubtful layers as it is on the model's own inputs where that
    is less."""
    if not doubtful:
        return list(errors)
    walk, tables = Walk(model, examples), dict(model.named_buffers())
    nodes = {n: [walk.node(g.name) for g in trial.part.given] for n, trial in doubtful.items()}
    walk.keep({node for given in nodes.values() for node in given})
    result = []
    for each in errors:
        if (trial := doubtful.get(each.part.name)) is not None:
            given = nodes[each.part.name]
            walk.run_past(given)
            values = [
                [expected, *(walk.values[node][i] for node in given)]
                for i, (expected, *_) in enumerate(trial.values)
            ]
            there = _Trial(each.part, values, trial.steps)
            again = requantized(each.part.leaves, each.ranges, tables, search=_SEARCH)
            excess = _excess(there.noise(Fix()), there.noise(again))
            each = replace(each, excess=min(each.excess, excess))
        result.append(each)
    return result


def _weight_ratio(leaf: Leaf) -> float:
    """How long the weight is along the reference's, whose direction rounding hardly changes."""
    assert leaf.weight is not None
    wanted, given = leaf.weight.double().flatten(), leaf.layer.weight.double().flatten()
    square = float(wanted @ wanted)
    return float(wanted @ given) / square if square else 1.0


def _input_ratio(tables: Mapping[str, Tensor], again: Fix, leaf: Leaf) -> float:
    """The scale of a leaf's input over the one it has in `again`: the median over timesteps."""
    made = again.modules[leaf.path]
    if leaf.layer.act_bits is None or not isinstance(made, QuantLayer):
        return 1.0
    if leaf.layer.dynamic:
        return 1.0
    if not leaf.layer.per_timestep:
        return float(leaf.layer.act_scale / made.act_scale)
    if leaf.column is None or leaf.column not in again.columns:
        return 1.0
    new = again.columns[leaf.column]
    ratios = tables[leaf.column[0]][:, leaf.column[1]] / new
    return float(ratios[ratios != 1].median()) if bool((ratios != 1).any()) else 1.0


def _furthest(ratios: Iterable[float]) -> float:
    """The ratio that is furthest from 1; NaN and what is not positive are further than all."""
    return max(ratios, key=lambda r: abs(math.log(r)) if r > 0 else math.inf)


def _unknown(trial: _Trial) -> str:
    """Why the layer cannot be built in floating point; "" where it can."""
    leaves = trial.part.leaves
    lost = [leaf.path for leaf in leaves if leaf.weight is None]
    if lost:
        return f"no fix can be built: the shape of {lost[0]} is not that of the reference's layer"
    rebuilt = trial.run(float_layer(leaves, trial.part.products), stop=1)
    signal, error = trial.energy(rebuilt).sum(1)
    bound = max(_REBUILT, 8 * torch.finfo(trial.values[0][0].dtype).eps)
    if float(error) <= bound**2 * float(signal):
        return ""
    return "no fix can be built: the reference's weight does not give its output here"


def _excess(found: Tensor, again: Tensor) -> float:
    """How many dB `found` (E,) lies below `again`, at least; as NaN it lies below all."""
    worse = (again - found).masked_fill(found.isnan() & ~again.isnan(), math.inf)
    return float(worse.masked_fill(worse.isnan(), 0.0).min())  # both NaN, or both exact
