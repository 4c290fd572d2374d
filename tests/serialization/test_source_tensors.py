"""sources: tensors are found by name, under fused adapters too; another model is told from ours."""

import copy

import pytest
import torch
from torch import nn

from tests.adapters import adapt
from tests.toys import SharedTwice, ToyDiT, ToyUNet, seeded
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.serialization.module_json import tensors_of
from tfmq_fx.serialization.source_tensors import (
    UnfusedAdapter,
    check_same_model,
    fill,
    place_of,
    shown,
    tensor_at,
    ties,
)

NAME = "time_mlp.0.weight"


@pytest.fixture
def model():
    return seeded(ToyUNet).eval()


def captured(model, x=(2, 3, 8, 8)):
    return capture(model, {"x": torch.randn(x), "t": torch.tensor([3])}, timestep="t").gm


def known(model):
    return dict(model.named_parameters(remove_duplicate=False))


# ---------------------------------------------------------------- by name


def test_parameters_buffers_and_plain_tensors_have_names(model):
    model.register_buffer("shift", torch.ones(2))
    model.plain = torch.ones(3)
    for name in (NAME, "shift", "plain"):
        assert tensor_at(model, name) is not None and place_of(model, name) == name
    assert tensor_at(model, "time_mlp.0.scale") is None
    assert tensor_at(model, "nowhere.weight") is None
    model.time_mlp[0].bias = None
    assert tensor_at(model, "time_mlp.0.bias") is None


def test_a_fused_adapter_is_looked_through(model):
    weight = model.get_parameter(NAME)
    (adapter,) = adapt(model, "time_mlp.0")
    with pytest.raises(UnfusedAdapter, match=r"time_mlp\.0 has an adapter that is not fused"):
        tensor_at(model, NAME)
    adapter.merge()
    assert tensor_at(model, NAME) is weight
    assert place_of(model, NAME) == "time_mlp.0.base_layer.weight"
    adapter.disable_adapters = True  # the next call takes it out again
    with pytest.raises(UnfusedAdapter):
        tensor_at(model, NAME)
    adapter.merged = False
    assert tensor_at(model, NAME) is weight


def test_names_from_under_an_adapter_are_found_without_it(model):
    assert tensor_at(model, "time_mlp.0.base_layer.weight") is model.get_parameter(NAME)
    (adapter,) = adapt(model, "time_mlp.0")
    assert tensor_at(model, "time_mlp.0.base_layer.weight") is adapter.base_layer.weight
    assert tensor_at(model, "time_mlp.0.down") is adapter.down


def test_parameters_of_adapters_are_not_the_models(model):
    names = known(model)
    adapt(model, "time_mlp.0")
    check_same_model(model, known=names, tied=())
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"it has extra\.weight, extra\.bias besides"):
        check_same_model(model, known=names, tied=())


def test_names_in_messages_are_few():
    assert shown(["a", "b"]) == "a, b"
    assert shown(list("abcdefg")) == "a, b, c, d, e, ... (7 in all)"


# ---------------------------------------------------------------- the same model


def test_a_model_is_the_same_as_itself_trained_moved_or_adapted(model):
    names = known(model)
    check_same_model(model, known=names, tied=())
    other = copy.deepcopy(model).train()
    for adapter in adapt(other, "time_mlp.0", "time_mlp.2"):
        adapter.merge()
    check_same_model(other, known=names, tied=())


def test_a_deeper_model_is_named(model):
    names = known(model)
    deeper = copy.deepcopy(model)
    deeper.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"this ToyUNet is another model: it has extra\.weight"):
        check_same_model(deeper, known=names, tied=())


def test_layers_that_were_one_must_still_be_one():
    model = seeded(SharedTwice).eval()
    gm = captured(model, x=(2, 4))
    tied = ties(model, set(tensors_of(gm)))
    assert tied == (("linear.weight", "alias.weight"), ("linear.bias", "alias.bias"))
    check_same_model(model, known=known(model), tied=tied)
    model.alias = copy.deepcopy(model.linear)
    with pytest.raises(ConfigError, match=r"linear\.weight, alias\.weight were one parameter"):
        check_same_model(model, known=known(model), tied=tied)


# ---------------------------------------------------------------- filling


def test_a_filled_graph_computes_what_the_source_does_on_its_memory(model):
    gm, x, t = captured(model), torch.randn(2, 3, 8, 8), torch.tensor([3, 3])
    other = seeded(ToyUNet, seed=1).eval()
    fill(gm, other, {})
    assert torch.equal(gm(x, t)[0], other(x, t)) and not torch.equal(gm(x, t)[0], model(x, t))
    weight = other.get_parameter(NAME)
    found = gm.get_parameter(NAME)
    assert found is not weight and found.data_ptr() == weight.data_ptr()
    fill(gm, model, {})
    assert torch.equal(gm(x, t)[0], model(x, t)) and other.get_parameter(NAME) is weight


def test_what_a_source_lacks_or_has_otherwise_is_named(model):
    gm = captured(model)
    with pytest.raises(ConfigError, match=r"this ToyDiT is another model: it has no .*weight"):
        fill(gm, seeded(ToyDiT), {})
    with pytest.raises(ConfigError, match=r"conv_in\.weight is float32 \(8, 3, 3, 3\), where .*16"):
        fill(gm, seeded(ToyUNet, width=8), {})
    with pytest.raises(ConfigError, match=r"weight is float16 .*, where it was float32"):
        fill(gm, copy.deepcopy(model).half(), {})
    with pytest.raises(ConfigError, match="on the meta device, without content"):
        fill(gm, copy.deepcopy(model).to("meta"), {})
    adapt(model, "time_mlp.2")
    with pytest.raises(UnfusedAdapter, match=r"time_mlp\.2 has an adapter .* Fuse it first"):
        fill(gm, model, {})
