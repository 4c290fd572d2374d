"""A call specification as JSON: what comes back, and what is refused, at which place."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.capture.test_call_spec import Output, spec
from tfmq_fx.capture.call_spec import CallSpec, Guard
from tfmq_fx.capture.nested_values import Branch, Const, Leaf
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.serialization.call_json import call_from_json, check_fits

GUARD = Guard(("not", ("gt", ("mul", "batch", 2), 8)), True, "2*batch <= 8", "unet.py:7")


def read(data: Any, outputs: Any = (Output,)) -> CallSpec:
    return call_from_json(json.loads(json.dumps(data)), "call", outputs)


def test_json_round_trip() -> None:
    whole = spec(guards=(GUARD,))
    assert read(whole.to_dict()) == whole


def changed(path: str, value: Any) -> dict[str, Any]:
    """The JSON of a specification with another value at a dotted path; ... takes the entry out."""
    data: Any = json.loads(json.dumps(spec(guards=(GUARD,)).to_dict()))
    place, *keys = data, *path.split(".")
    for key in keys[:-1]:
        place = place[int(key) if key.isdigit() else key]
    last = int(keys[-1]) if keys[-1].isdigit() else keys[-1]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data  # type: ignore[no-any-return]


tower: Any = "batch"
for _ in range(5):
    tower = ["pow", tower, 16]

REFUSED: list[tuple[str, Any, str]] = [
    ("surprise", 1, "call: unknown keys"),
    ("inputs", ..., r"call: missing keys .'inputs'"),
    ("inputs", {}, r"call.inputs: expected list"),
    ("inputs.0", 3, r"call.inputs.0.: expected an object, found 3"),
    ("inputs.0.shape", [-1], r"call.inputs.0..shape: .* is no list of sizes"),
    ("inputs.0.dtype", "load", r"call.inputs.0..dtype: damaged value"),
    ("inputs.0.name", "t", r"call.inputs: a name is given twice"),
    ("inputs.1.shape", ["batch", 2], r"call.timestep: 't' is no input of one dimension"),
    ("arguments.0.structure.leaf", 1, r"call.arguments.0..structure: its tensors are numbered .1."),
    ("arguments.0.structure.leaf", True, r"arguments.0..structure.leaf: expected int, found True"),
    ("arguments.1.first", 2, r"call.arguments.1..first: 2, not 1"),
    ("arguments.0", ..., r"call.arguments.0..first: 1, not 0"),
    ("arguments.3.structure.children", [], r"structure: 2 keys for 0 values"),
    ("arguments.3.structure.kind", "set", r"structure: no 'set' of 2"),
    ("arguments.2.structure.const", [1], r"structure.const: expected bool or int or float or str"),
    ("output.class", "os:system", r"call.output.class: the output type 'os:system' is none of"),
    ("output.class", "no.such:Out", r"give it by hand: load.path, outputs="),
    ("output.class", "diffusers.models.attention:Attention", "is not an output type"),
    ("output.class", "diffusers.models.nothing.at_all:Output", "cannot be imported"),
    ("output.class", "diffusers.utils.testing_utils:Output", "none of diffusers' or"),
    ("output.keys", ["sample", "more"], r"takes the fields .'extra', 'sample'., not"),
    ("output.children.0.leaf", 4, r"call.output: its tensors are numbered .4."),
    ("return_dict", "yes", r"call.return_dict: expected bool or null"),
    ("conditions", ["y"], r"call.conditions: .'y'. are no inputs"),
    ("guards.0.holds", 1, r"call.guards.0..holds: expected bool, found 1"),
    ("guards.0.expression", ["system", 1], r"guards.0..expression: unknown size expression"),
    ("guards.0.expression", ["add", 1], r"expression: add takes 2 operands"),
    ("guards.0.expression", "height", r"expression: there is no size 'height'"),
    ("guards.0.expression", ["pow", 2, 10**9], r"expression: powers are numbers up to 16"),
    ("guards.0.expression", tower, r"a power of a power"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=lambda item: str(item)[:40])
def test_what_is_refused_names_the_place(path: str, value: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(changed(path, value))


def test_classes_of_ones_own_must_be_given() -> None:
    with pytest.raises(ArtifactError, match="give it by hand"):
        read(spec().to_dict(), outputs=())


def test_dataclasses_that_happen_to_be_imported_are_no_output_types() -> None:
    with pytest.raises(ArtifactError, match="give it by hand"):
        read(changed("output.class", "torch._dynamo.aot_compile:AOTCompiledFunction"))


def test_values_that_json_lacks_cannot_be_saved() -> None:
    with pytest.raises(ArtifactError, match="cannot be saved"):
        spec(output=Const(object())).to_dict()


def test_diffusers_output_classes_are_found() -> None:
    from diffusers.models.unets.unet_2d import UNet2DOutput

    whole = spec(output=Branch("object", ("sample",), (Leaf(0),), UNet2DOutput))
    assert read(whole.to_dict(), outputs=()) == whole


def a_graph() -> fx.GraphModule:
    """A graph that calls by `spec` are calls of."""
    graph = fx.Graph()
    shapes = {"x": (3, 4), "t": (3,), "cond_c": (3, 2)}
    for name, shape in shapes.items():
        graph.placeholder(name).meta["val"] = torch.zeros(shape)
    graph.output((next(iter(graph.nodes)),))
    return fx.GraphModule(nn.Module(), graph)


def test_a_call_must_fit_the_graph() -> None:
    gm = a_graph()
    check_fits(spec(), gm, "call")
    two = Branch("object", ("sample", "extra"), (Leaf(0), Leaf(1)), Output)
    with pytest.raises(ArtifactError, match=r"call.output: 2 tensors, but the graph gives 1"):
        check_fits(spec(output=two), gm, "call")
    swapped = copy.deepcopy(gm)
    x, t, *_ = swapped.graph.nodes
    x.target, t.target = "t", "x"
    with pytest.raises(ArtifactError, match=r"call.inputs: .*, but the graph takes .'t', 'x'"):
        check_fits(spec(), swapped, "call")
    x, *_ = gm.graph.nodes
    x.meta["val"] = torch.zeros(3, 5)
    with pytest.raises(ArtifactError, match=r"call.inputs.0.: x is .'batch', 4., and in .* .3, 5."):
        check_fits(spec(), gm, "call")


def test_guards_are_tried_at_the_captured_sizes() -> None:
    zero = Guard(("mod", "batch", ("add", "batch", -3)), True, "", "")
    with pytest.raises(ArtifactError, match=r"call.guards.0.: cannot be evaluated"):
        check_fits(spec(guards=(zero,)), a_graph(), "call")
