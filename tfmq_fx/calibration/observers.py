"""Record the range of each layer's input per timestep, and samples of the model's inputs."""

from __future__ import annotations

import functools
import itertools
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.stages import Stage


@dataclass(frozen=True, slots=True)
class Ranges:
    """Lowest and highest input of one layer at each timestep of a set.

    low, high: (K,) float32.  interpolated: how many of the K were not visited by calibration.
    """

    low: Tensor
    high: Tensor
    interpolated: int


class RangeObserver(nn.Module):
    """Returns its input unchanged and records its lowest and highest value for each timestep."""

    stage = Stage.OBSERVED

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.seen: dict[float, tuple[float, float]] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`x`, recorded: (B, ...) or (n B, ...), else all of x counts for each of t (B,).

        Raises CalibrationError on NaN or Inf.
        """
        batched = x.shape[0] % len(t) == 0
        rows = x.detach().reshape(len(t) if batched else 1, -1).expand(len(t), -1)
        low, high = rows.amin(1).float().tolist(), rows.amax(1).float().tolist()
        for step, a, b in zip(t.tolist(), low, high, strict=True):
            if not (np.isfinite(a) and np.isfinite(b)):
                raise CalibrationError(
                    f"the input of {self.site} holds NaN or Inf at timestep {step}; "
                    "check the calibration data and the model's weights"
                )
            self.merge({step: (a, b)})
        return x

    def merge(self, seen: Mapping[float, tuple[float, float]]) -> None:
        """Add the ranges that another observer of the same layer saw later."""
        for step, (a, b) in seen.items():
            old = self.seen.get(step)
            self.seen[step] = (min(a, old[0]), max(b, old[1])) if old else (a, b)

    def ranges(self, timesteps: Tensor) -> Ranges:
        """The range at each of `timesteps` (K,); those not visited are interpolated in t."""
        steps = np.array(sorted(self.seen))
        positions = timesteps.double().cpu().numpy()
        ends = zip(*(self.seen[s] for s in steps), strict=True)
        low, high = (torch.from_numpy(np.interp(positions, steps, end)).float() for end in ends)
        return Ranges(low, high, int((~np.isin(positions, steps)).sum()))


def sample_row(inputs: Sequence[Tensor], batched: Sequence[bool], i: int) -> tuple[Tensor, ...]:
    """A copy of sample i of a call; inputs without a batch are copied whole."""
    pairs = zip(inputs, batched, strict=True)
    return tuple((x[i : i + 1] if b else x).detach().clone() for x, b in pairs)


def row_bytes(inputs: Sequence[Tensor], batched: Sequence[bool]) -> int:
    """Bytes of one sample of a call."""
    return sum((x[:1] if b else x).nbytes for x, b in zip(inputs, batched, strict=True))


def _in_place(
    rows: Sequence[tuple[Tensor, ...]], held: Mapping[int, Tensor], batch: int
) -> list[tuple[Tensor, ...]]:
    """The rows in an order in which each batch has the values `held`, some of them repeated."""
    places = [
        [row for row in rows if all(torch.equal(row[k][0], v[i]) for k, v in held.items())]
        for i in range(batch)
    ]
    if missing := [i for i, fitting in enumerate(places) if not fitting]:
        raise CalibrationError(
            f"no sample of calibration has the values at place {missing[0]} of the batch for which "
            f"the graph was captured: calibrate with inputs such as the example"
        )
    longest = max(map(len, places))
    return [fitting[n % len(fitting)] for n in range(longest) for fitting in places]


class SampleCache:
    """A bounded, seeded sample of the inputs calibration saw, spread evenly over timesteps.

    capacity: bytes kept at most.  Within a timestep every sample is equally likely to be kept;
    where there is no room for one sample of each timestep, so is every timestep.
    """

    def __init__(self, *, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.visits: dict[float, int] = {}
        self.rows: dict[float, list[tuple[Tensor, ...]]] = {}  # the samples of each timestep
        # Of all samples ever offered of a timestep those with the smallest random keys are kept,
        # sorted by them: whatever is cut off later, what stays is a fair sample.
        self._keys: dict[float, list[float]] = {}
        self._rank: dict[float, float] = {}  # timesteps of low rank stay where room is short
        self._random = np.random.default_rng(seed)
        self._row_bytes = 0  # of the largest sample, so that room is never gained again
        self._share, self._left_out = 1, set[float]()

    @classmethod
    def holding(
        cls, rows: Mapping[float, Sequence[tuple[Tensor, ...]]], visits: Mapping[float, int]
    ) -> Self:
        """A full cache of `rows`, samples by timestep, and how often each timestep was visited."""
        cache = cls(capacity=0, seed=0)
        cache.rows = {step: list(samples) for step, samples in rows.items()}
        cache._keys = {step: [0.0] * len(samples) for step, samples in rows.items()}
        cache._rank = dict.fromkeys(rows, 0.0)
        cache.visits = dict(visits)
        return cache

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))

    def add(self, inputs: Sequence[Tensor], batched: Sequence[bool], timestep: int) -> None:
        """Offer the samples of one call.

        inputs: placeholder values.  batched: which of them carry the batch in dim 0.
        timestep: the position of the timestep (B,) among them.
        """
        row = functools.partial(sample_row, inputs, batched)
        self.offer(inputs[timestep].tolist(), row_bytes(inputs, batched), row)

    def offer(self, steps: Sequence[float], size: int, row: Callable[[int], Any]) -> None:
        """Offer one sample for each of `steps`, of `size` bytes each.

        row(i): the sample at position i, or a placeholder to be replaced in `rows` later; called
        for the samples that are kept.
        """
        if size > self._row_bytes:
            self._row_bytes = size
            self._trim()
        for i, step in enumerate(steps):
            self.visits[step] = self.visits.get(step, 0) + 1
            if step not in self.rows:
                self.rows[step], self._keys[step] = [], []
                self._rank[step] = self._random.random()
                self._trim()
            rows, keys, key = self.rows[step], self._keys[step], self._random.random()
            limit = self._limit(step)
            place = bisect(keys, key)
            if place < limit:
                keys.insert(place, key)
                rows.insert(place, row(i))
                del keys[limit:], rows[limit:]

    def _trim(self) -> None:
        """Drop samples: more timesteps, or larger samples, leave less room for each timestep."""
        room = max(1, self.capacity // max(self._row_bytes, 1))
        self._share = max(1, room // max(len(self.rows), 1))
        self._left_out = set(sorted(self._rank, key=self._rank.__getitem__)[room:])
        for step, rows in self.rows.items():
            limit = self._limit(step)
            del self._keys[step][limit:], rows[limit:]

    def _limit(self, step: float) -> int:
        """How many samples of this timestep may be kept."""
        return 0 if step in self._left_out else self._share

    def chunks(
        self,
        count: int,
        *,
        batched: Sequence[bool],
        batch_size: int,
        seed: int,
        center: float | None = None,
        whole: bool = False,
        held: Mapping[int, Tensor] | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """About `count` samples, shuffled, in batches of `batch_size`.

        The last batch may be smaller, unless `whole` fills it up with the first samples.
        Samples are spread evenly over timesteps; with `center`, timesteps are drawn from a normal
        distribution about that share of the sorted set, with a deviation of half the set (PTQ4DM);
        then there are fewer than `count` where a timestep has too few samples.
        held: values that inputs have in every batch, by position: samples stand where they had
        them.
        Raises CalibrationError where there is no sample for a place.
        """
        random = np.random.default_rng(seed)
        shares = self._shares(count, center, random)
        picked = [row for step in sorted(shares) for row in self.rows[step][: shares[step]]]
        picked = [picked[i] for i in random.permutation(len(picked))][:count]
        if held:
            picked = _in_place(picked, held, batch_size)
        if whole:
            lacking = -len(picked) % batch_size
            picked += itertools.islice(itertools.cycle(list(picked)), lacking)
        return [
            tuple(
                torch.cat([row[k] for row in part]) if b else part[0][k]
                for k, b in enumerate(batched)
            )
            for part in (picked[i : i + batch_size] for i in range(0, len(picked), batch_size))
        ]

    def needed(
        self, count: int, *, seed: int, center: float | None = None
    ) -> dict[float, list[tuple[Tensor, ...]]]:
        """The samples that `chunks` may draw, at least one for each timestep that has any.

        A cache with these alone gives the same chunks.
        """
        shares = self._shares(count, center, np.random.default_rng(seed))
        return {step: self.rows[step][: max(1, n)] for step, n in shares.items()}

    def weights(self, timesteps: Sequence[Tensor]) -> list[Tensor] | None:
        """Weights (n,) float32 of samples at `timesteps` (n,), chunk by chunk, by which each
        timestep counts as often as it was visited; None where all were visited equally often.

        A weight is visits / samples of the timestep, over the mean.
        """
        steps = [step for part in timesteps for step in part.tolist()]
        if len({self.visits[step] for step in steps}) < 2:
            return None
        counts = Counter(steps)
        mean = sum(self.visits[step] for step in counts) / len(steps)
        weights = torch.tensor(
            [self.visits[s] / counts[s] / mean for s in steps], dtype=torch.float32
        )
        return list(weights.split([len(part) for part in timesteps]))

    def _shares(
        self, count: int, center: float | None, random: np.random.Generator
    ) -> dict[float, int]:
        """How many samples to take of each timestep that has any."""
        steps = sorted(step for step, rows in self.rows.items() if rows)
        if center is None:
            return dict.fromkeys(steps, max(1, round(count / max(len(steps), 1))))
        places = (np.arange(len(steps)) + 0.5) / len(steps)
        density = np.exp(-0.5 * ((places - center) / 0.5) ** 2)
        drawn = random.multinomial(count, density / density.sum())
        return dict(zip(steps, drawn.tolist(), strict=True))
