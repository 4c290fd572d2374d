"""equal_time: steps that fit into a time, by a clock of our own."""

from __future__ import annotations

import pytest

from tfmq_fx.equal_time import Line, Timings, fit_line


def clock(fixed, per_step):
    """Seconds of a run, and the runs made."""
    runs = []

    def seconds(steps):
        runs.append(steps)
        return fixed + per_step * steps

    return seconds, runs


def test_two_runs_give_the_line_and_the_line_gives_the_steps():
    seconds, runs = clock(20.0, 0.5)
    line = fit_line(seconds, most=20_000)
    assert runs == [4, 12] and line.probes == [(4, 22.0), (12, 26.0)]
    assert line.fixed == pytest.approx(20) and line.per_step == pytest.approx(0.5)
    assert line.steps(52.0, most=20_000) == 64 and seconds(64) == 52.0


def test_cheap_steps_are_measured_on_longer_runs():
    seconds, runs = clock(20.0, 0.01)
    line = fit_line(seconds, most=20_000)
    assert runs == [4, 12, 48, 192, 768]
    assert line.per_step == pytest.approx(0.01) and line.steps(30.0, most=20_000) == 1000


def test_steps_stay_between_one_and_what_the_recipe_has():
    line = Line(fixed=20.0, per_step=0.5, probes=[])
    assert line.steps(5.0, most=100) == 1
    assert line.steps(1000.0, most=100) == 100
    free = Line(fixed=20.0, per_step=0.0, probes=[])
    assert free.steps(21.0, most=100) == 100 and free.steps(19.0, most=100) == 1


def test_a_recipe_of_few_steps_is_run_no_longer_than_that():
    seconds, runs = clock(1.0, 0.0)
    assert fit_line(seconds, most=8).per_step == 0 and runs == [4, 8]
    seconds, runs = clock(1.0, 1.0)
    assert fit_line(seconds, most=3).steps(9.0, most=3) == 3 and runs == [3]


def test_a_clock_that_runs_backwards_gives_no_negative_cost():
    times = {4: 10.0, 12: 9.0, 48: 9.5}
    assert fit_line(times.__getitem__, most=48).per_step == 0


def test_timings_are_kept_and_measured_again_when_damaged(tmp_path):
    timings = Timings(tmp_path / "timings")
    assert timings.target("best") is None
    timings.keep_target("best", 52.5)
    seconds, runs = clock(20.0, 0.5)
    line = timings.line("tfmq", lambda: fit_line(seconds, most=100))
    again = Timings(tmp_path / "timings")
    assert again.target("best") == 52.5
    assert again.line("tfmq", lambda: pytest.fail("measured twice")) == line
    (tmp_path / "timings" / "tfmq.json").write_text("{")
    (tmp_path / "timings" / "best.json").write_text("[]")
    assert again.target("best") is None
    assert again.line("tfmq", lambda: fit_line(seconds, most=100)) == line and runs == [4, 12] * 2
