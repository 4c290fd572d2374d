"""Names in saved files: unique, no paths, and each comes back as what it names."""

import sys

import pytest
import torch
from torch import fx, nn

from tests.serialization.test_graph_json import one_node, round_trip
from tests.serialization.test_json_values import through_text
from tests.serialization.test_module_json import of_module
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.modules import QUANTIZED
from tfmq_fx.serialization.allowlist import function_name, function_named, module_class
from tfmq_fx.serialization.graph_json import from_json, to_json
from tfmq_fx.serialization.saved_names import FUNCTIONS, MODULES, OLD_NAMES, is_own, saved_name

LAYERS = {
    "QuantLinear": nn.Linear(4, 3),
    "QuantConv1d": nn.Conv1d(4, 3, 1),
    "QuantConv2d": nn.Conv2d(4, 3, 3, padding=1),
    "QuantConv3d": nn.Conv3d(4, 3, 1, bias=False),
    "QuantConvTranspose1d": nn.ConvTranspose1d(4, 3, 2),
    "QuantConvTranspose2d": nn.ConvTranspose2d(4, 3, 2, stride=2, output_padding=1),
    "QuantConvTranspose3d": nn.ConvTranspose3d(4, 3, 1, bias=False),
}
CALLED = {
    "inplace_": ("add_", 2),
    "setitem_": (0, 3.0),
    "check_held": (2.0, "mask", "model.py:3"),
    "checked_sizes": ((2, None), "blocks.0"),
}


def made(name):
    """A module of the class that is saved under `name`."""
    kind = MODULES[name]
    if name in LAYERS:
        return kind.from_float(LAYERS[name], weight_bits=4, act_bits=8, per_timestep=False)
    if name == "LowRank":
        return kind.from_layer(nn.Linear(4, 3), torch.randn(2, 4), torch.randn(3, 2))
    if name == "QuantTimestepTable":
        return kind.from_rows(torch.tensor([1, 7]), [torch.randn(2, 4)], bits=8)
    return kind(bits=8, per_timestep=False)


def test_names_are_unique_and_no_paths():
    names = [*MODULES, *FUNCTIONS]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)
    assert {*OLD_NAMES.values()} <= {*names}  # later ones have no other name
    assert set(QUANTIZED.values()) <= set(MODULES.values())
    for value in (*MODULES.values(), *FUNCTIONS.values()):
        assert {**MODULES, **FUNCTIONS}[saved_name(value)] is value
    assert all(map(is_own, MODULES.values())) and not is_own(nn.Linear)
    assert saved_name(nn.Linear) is None and saved_name(torch.relu) is None


@pytest.mark.parametrize("name", MODULES)
def test_every_class_is_saved_and_loaded_by_its_name(name):
    gm = of_module(made(name))
    gm.meta["stage"] = Stage.QUANTIZED
    data = through_text(to_json(gm))
    assert data["modules"]["leaf"]["class"] == name and "tfmq_fx." not in str(data)
    again = round_trip(gm).leaf
    assert type(again) is MODULES[name] and again.spec() == gm.leaf.spec()
    found = again.state_dict()
    for key, value in gm.leaf.state_dict().items():
        assert torch.equal(*(v.reshape(-1).view(torch.uint8) for v in (found[key], value)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_saved_and_loaded_by_its_name(name):
    gm = one_node("call_function", FUNCTIONS[name], "x", *CALLED[name])
    data = through_text(to_json(gm))
    assert data["nodes"][1]["target"] == name and "tfmq_fx." not in str(data)
    again = list(round_trip(gm).graph.nodes)[1]
    assert again.target is FUNCTIONS[name]
    assert function_named(function_name(FUNCTIONS[name], "x"), "x") is FUNCTIONS[name]


UNKNOWN = [*OLD_NAMES, "payload", "payload.Layer", "tfmq_fx.saved_names.LowRank", "Module", ""]


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name or "empty")
def test_other_names_are_refused_and_never_looked_up(name, tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArtifactError, match="may not hold a"):
        module_class(name, "x")
    with pytest.raises(ArtifactError, match="may not call"):
        function_named(name, "x")
    data = through_text(to_json(of_module(made("LowRank"))))
    data["modules"]["leaf"]["class"] = name
    with pytest.raises(ArtifactError, match=r"modules\.leaf: a saved graph may not hold"):
        from_json(data)
    assert "payload" not in sys.modules


def test_a_class_that_only_looks_like_ours_is_refused():
    class LowRank(nn.Identity):
        """None of the table's."""

    with pytest.raises(ArtifactError, match=r"may not hold a .*LowRank"):
        to_json(of_module(LowRank()))
    graph = fx.Graph()
    x = graph.placeholder("x")

    def inplace_(x):
        return x

    graph.output(graph.call_function(inplace_, (x,)))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(2)
    with pytest.raises(ArtifactError, match=r"may not call .*inplace_"):
        to_json(fx.GraphModule(nn.Module(), graph))
