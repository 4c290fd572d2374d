import operator

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from tests.strategies import STEPS, WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tfmq_fx.core.errors import ConfigError, GraphError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.graph import fork, insert_timestep_row, module_path, set_buffer, timestep_node
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass


def denoiser():
    b = GraphBuilder()
    h = b.layer("time.linear", nn.Linear(WIDTH, WIDTH), b.sinusoid())
    return b.finish(b.call(operator.mul, h, b.x))


@graph_pass(takes=Stage.CAPTURED, gives=Stage.OBSERVED)
def negate(gm: fx.GraphModule) -> Rewrite:
    """Negate every linear layer's output, and leave rubbish behind."""
    assert not torch.is_grad_enabled()
    layers = gm.graph.find_nodes(op="call_module", target="time.linear")
    for layer in layers:
        with gm.graph.inserting_after(layer):
            new = gm.graph.call_function(operator.neg, (layer,))
        layer.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        new.meta = dict(layer.meta)
        with gm.graph.inserting_after(new):
            gm.graph.call_function(operator.neg, (new,))  # dead, and without its value
    gm.add_submodule("unused", nn.Identity())
    return Rewrite(gm, len(layers))


@settings(deadline=None, max_examples=10)
@given(gm=captured_graphs())
def test_a_fork_computes_the_same_and_owns_its_graph(gm):
    copy = fork(gm)
    inputs = draw_inputs(gm, 2).values()
    assert all(map(torch.equal, copy(*inputs), gm(*inputs)))
    for name, parameter in copy.named_parameters():  # those that the graph uses
        assert parameter is gm.get_parameter(name)
    code = gm.code
    last = copy.graph.output_node()
    last.args = ((last.prev,),)
    copy.recompile()
    assert gm.code == code and copy.meta == gm.meta and copy.meta is not gm.meta


def test_replacing_a_module_in_a_fork_leaves_the_original_alone():
    gm = denoiser()
    copy = fork(gm)
    copy.set_submodule("time.linear", nn.Identity())
    assert isinstance(gm.get_submodule("time.linear"), nn.Linear)


def test_a_pass_leaves_its_input_alone_and_cleans_up():
    gm = denoiser()
    code = gm.code
    done = negate(gm)
    x, t = torch.randn(2, WIDTH), STEPS[:2]
    assert torch.equal(done.gm(x, t)[0], -gm(x, t)[0])
    assert gm.code == code and stage_of(gm) is Stage.CAPTURED
    assert stage_of(done.gm) is Stage.OBSERVED
    assert not hasattr(done.gm, "unused")
    assert sum(n.target is operator.neg for n in done.gm.graph.nodes) == 1
    assert (done.name, done.changed) == ("negate", 1) and done.seconds > 0


def test_a_pass_refuses_its_own_output():
    with pytest.raises(GraphError, match="expected a captured graph, found a observed one"):
        negate(negate(denoiser()).gm)


def test_errors_say_which_pass():
    @graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
    def refuse(gm: fx.GraphModule) -> Rewrite:
        raise ConfigError("no")

    with pytest.raises(ConfigError) as caught:
        refuse(denoiser())
    assert caught.value.__notes__ == ["in pass refuse"]


def test_a_pass_that_forgets_a_value_is_caught():
    @graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
    def forget(gm: fx.GraphModule) -> Rewrite:
        del next(iter(gm.graph.find_nodes(op="call_module"))).meta["val"]
        return Rewrite(gm, 1)

    with pytest.raises(GraphError, match="a pass made it without its value"):
        forget(denoiser())


def test_module_path_is_where_a_node_was_recorded():
    gm = denoiser()
    paths = {n.name: module_path(n) for n in gm.graph.nodes}
    assert paths["time_linear"] == "time.linear" and paths["sin"] == "" and paths["x"] == ""


def test_buffers_never_replace_each_other():
    gm = denoiser()
    assert [set_buffer(gm, "rows", torch.ones(1)) for _ in range(3)] == ["rows", "rows_1", "rows_2"]


def test_look_ups_over_one_set_share_its_keys():
    gm = denoiser()
    first = insert_timestep_row(gm, "a", torch.ones(6, 2), STEPS)
    second = insert_timestep_row(gm, "b", torch.ones(6, 3), STEPS)
    third = insert_timestep_row(gm, "c", torch.ones(2, 3), STEPS[:2])
    assert first.args[1].target == second.args[1].target == "temporal_keys"
    assert third.args[1].target == "temporal_keys_1"
    batch = timestep_node(gm).meta["val"].shape[0]
    assert [n.meta["val"].shape for n in (first, second)] == [(batch, 2), (batch, 3)]
