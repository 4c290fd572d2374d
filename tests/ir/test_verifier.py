"""Each thing that `check` guards against, broken on purpose."""

import operator

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.strategies import STEPS, WIDTH, GraphBuilder, captured_graphs
from tfmq_fx.core.errors import GraphError
from tfmq_fx.core.stages import Stage, introduced_by, stage_of
from tfmq_fx.ir.verifier import check
from tfmq_fx.passes.fold_timesteps import fold_timesteps


def denoiser():
    b = GraphBuilder()
    h = b.layer("time.linear", nn.Linear(WIDTH, WIDTH), b.sinusoid())
    return b.finish(b.call(operator.mul, h, b.x))


@settings(deadline=None, max_examples=20)
@given(gm=captured_graphs())
def test_sound_graphs_pass(gm):
    check(gm, Stage.CAPTURED)
    check(fold_timesteps(gm, timesteps=STEPS).gm, Stage.FOLDED)


def node(gm, name):
    return next(n for n in gm.graph.nodes if n.name == name)


def edit_without_recompiling(gm):
    node(gm, "mul_1").target = operator.add


def lose_module(gm):
    del gm.time.linear


def lose_buffer(gm):
    del gm.frequencies


def lose_value(gm):
    del node(gm, "time_linear").meta["val"]


def use_later_module(gm):
    gm.time.linear.stage = Stage.QUANTIZED


def break_order(gm):
    node(gm, "sin").args = (node(gm, "mul_1"),)


def mark_later(gm):
    gm.meta["stage"] = Stage.QUANTIZED


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (edit_without_recompiling, "edited after its code was made"),
        (lose_module, "time_linear: no module 'time.linear'|malformed captured graph.*time.linear"),
        (lose_buffer, "frequencies: no attribute|malformed captured graph.*frequencies"),
        (lose_value, r"time_linear: no meta\['val'\]"),
        (use_later_module, "time_linear: Linear is not legal in a captured graph"),
        (break_order, "malformed captured graph"),
        (mark_later, "expected a captured graph, found a quantized one"),
    ],
)
def test_planted_faults_are_found(fault, text):
    gm = denoiser()
    fault(gm)
    with pytest.raises(GraphError, match=text):
        check(gm, Stage.CAPTURED)


def test_look_ups_are_illegal_before_folding():
    folded = fold_timesteps(denoiser(), timesteps=STEPS).gm
    folded.meta["stage"] = Stage.CAPTURED
    with pytest.raises(GraphError, match=r"timestep_row.* is not legal in a captured graph"):
        check(folded, Stage.CAPTURED)


def test_a_table_has_a_row_for_each_key():
    folded = fold_timesteps(denoiser(), timesteps=STEPS).gm
    folded.temporal_table = folded.temporal_table[1:]
    with pytest.raises(GraphError, match="'temporal_table' has 5 rows for 6 timesteps"):
        check(folded, Stage.FOLDED)


def test_table_and_keys_are_nodes():
    folded = fold_timesteps(denoiser(), timesteps=STEPS).gm
    row = next(n for n in folded.graph.nodes if n.name.startswith("timestep_row"))
    row.args = (row.args[0], None, row.args[2])
    folded.recompile()
    with pytest.raises(GraphError, match="table and keys must be values of the graph"):
        check(folded, Stage.FOLDED)


def test_stages_allow_what_earlier_ones_brought_except_observers():
    assert Stage.LOWERED.allows(Stage.FOLDED) and Stage.FOLDED.allows(Stage.CAPTURED)
    assert not Stage.QUANTIZED.allows(Stage.OBSERVED)
    assert not Stage.CAPTURED.allows(Stage.FOLDED)
    assert introduced_by(nn.Linear(1, 1)) is introduced_by(torch.add) is Stage.CAPTURED
    assert stage_of(denoiser()) is Stage.CAPTURED
