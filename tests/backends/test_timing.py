"""Timing: the fastest call counts, in microseconds, after those that may compile."""

import pytest

from tfmq_fx.backends import timing


def test_the_fastest_of_several_calls_counts(monkeypatch):
    now = iter([0.0, 5e-6, 7e-6, 9e-6, 10e-6, 19e-6])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    done = []
    found = timing.least_micros(lambda: done.append(1), calls=3, warmups=2)
    assert found == pytest.approx(2.0) and len(done) == 5
