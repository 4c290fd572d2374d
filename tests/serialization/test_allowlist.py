import importlib
import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.serialization.test_graph_json import one_node, round_trip
from tests.serialization.test_json_values import through_text
from tests.serialization.test_module_json import of_module
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.ir.functionalize import inplace_
from tfmq_fx.serialization.allowlist import function_name, function_named
from tfmq_fx.serialization.graph_json import from_json, to_json


def edited(gm, **changes):
    """The saved form of a one-node graph, with the call replaced."""
    data = to_json(gm)
    data["nodes"][1].update(changes)
    return through_text(data)


SAFE = one_node("call_function", torch.relu, "x")
FORBIDDEN = [
    ("torch.load", torch.load),
    ("os.system", os.system),
    ("builtins.eval", eval),
    ("builtins.exec", exec),
    ("builtins.__import__", __import__),
    ("builtins.setattr", setattr),
    ("torch.hub.load", torch.hub.load),
    ("torch.save", torch.save),
    ("torch.from_file", torch.from_file),
    ("torch.compile", torch.compile),
    ("torch.Tensor.__reduce_ex__", torch.Tensor.__reduce_ex__),
    ("operator.attrgetter", __import__("operator").attrgetter),
    ("operator.methodcaller", __import__("operator").methodcaller),
    ("torch.nn.functional.boolean_dispatch", F.boolean_dispatch),
    ("torch.ops.aten.from_file.default", torch.ops.aten.from_file.default),
    ("torch.ops.aten.save.default", torch.ops.aten.save.default),
    ("torch.ops.profiler._record_function_enter.default", None),
    ("torch.ops.load_library", torch.ops.load_library),
    ("tfmq_fx.serialization.graph_json.from_json", from_json),
    ("tfmq_fx.ir.functionalize.inplace_", None),
    ("tfmq_fx.serialization.saved_names.inplace_", None),
    ("QuantLinear", None),
    ("tfmq_fx.serialization.allowlist.importlib.import_module", importlib.import_module),
    ("tfmq_fx.__main__.main", None),
    ("tfmq_fx..x", None),
    ("", None),
]


@pytest.mark.parametrize(("name", "function"), FORBIDDEN, ids=[n or "empty" for n, _ in FORBIDDEN])
def test_functions_off_the_list_are_refused_both_ways(name, function):
    with pytest.raises(
        ArtifactError, match=r"relu: (a saved graph may not call|there is no|cannot import)"
    ):
        from_json(edited(SAFE, target=name))
    if function is not None:
        gm = one_node("call_function", function, "x")
        with pytest.raises(ArtifactError, match=r"may not call|there is no operator"):
            to_json(gm)


UNSAFE = [
    "torch.ops.aten.segment_reduce.default",
    "torch.ops.aten.max_pool2d_with_indices_backward.default",
    "torch.ops.aten.resize_.default",
    "torch.ops.aten.set_data.default",
    "torch.ops.aten.set_.source_Tensor",
    "torch.ops.aten.sparse_coo_tensor.indices_size",
    "torch.ops.aten.native_batch_norm.default",
    "torch.ops.aten.add.out",
    "torch.ops.aten.rrelu_with_noise.default",
    "torch.ops.prims.resize.default",
    "torch.segment_reduce",
    "torch.sparse_csr_tensor",
    "torch.lu_solve",
    "torch._C._nn.max_pool2d_with_indices_backward",
    "torch.nn.functional.embedding_bag",
    "math.factorial",
    "torch.lcm",
    "torch.ops.prims.div.default",
]


@pytest.mark.parametrize("name", UNSAFE)
def test_what_can_crash_or_resize_is_off_the_list(name):
    with pytest.raises(ArtifactError, match=r"relu: a saved graph may not call"):
        from_json(edited(SAFE, target=name))


@pytest.mark.parametrize(
    "method", ["resize_", "set_", "as_strided_", "to_sparse", "storage", "type", "register_hook"]
)
def test_methods_that_change_more_than_elements_are_off_the_list(method):
    for change in (
        {"op": "call_method", "target": method},
        {"target": "inplace_", "args": [{"node": "x"}, method]},
    ):
        with pytest.raises(ArtifactError, match="may not call method"):
            from_json(edited(SAFE, **change))


def test_numbers_are_no_dtypes():
    # torch takes any number there, and crashes
    name = "torch.ops.aten.to.dtype"
    for value in (100, {"node": "x"}):
        with pytest.raises(ArtifactError, match=r"relu: dtype of aten.to.dtype is"):
            from_json(edited(SAFE, target=name, args=[{"node": "x"}, value]))
    again = from_json(edited(SAFE, target=name, args=[{"node": "x"}, {"dtype": "float64"}]))
    assert again(torch.ones(1)).dtype is torch.float64


def test_results_go_nowhere_else():
    with pytest.raises(ArtifactError, match="relu: a saved graph may not write to out="):
        from_json(edited(SAFE, kwargs={"out": {"node": "x"}}))
    with pytest.raises(ArtifactError, match=r"may not round by 'trunc'"):
        from_json(edited(SAFE, target="torch.div", kwargs={"rounding_mode": "trunc"}))
    with pytest.raises(ArtifactError, match=r"may not make tensors of torch.sparse_coo"):
        from_json(edited(SAFE, kwargs={"layout": {"layout": "sparse_coo"}}))


def test_aliases_keep_their_names():
    for name in ("mm", "dsmm"):
        function = getattr(torch, name)
        assert function_name(function, "x") == f"torch.{name}"
        assert function_named(f"torch.{name}", "x") is function


@pytest.mark.parametrize(
    "method",
    ["__reduce_ex__", "__class__", "apply_", "numpy", "data_ptr", "shape", "no_such", "a;b", "a.b"],
)
def test_methods_off_the_list_are_refused_both_ways(method):
    with pytest.raises(ArtifactError, match=f"may not call method {method!r}"):
        from_json(edited(SAFE, op="call_method", target=method))
    gm = one_node("call_method", "relu", "x")
    next(n for n in gm.graph.nodes if n.op == "call_method").target = method
    with pytest.raises(ArtifactError, match=f"may not call method {method!r}"):
        to_json(gm)


@pytest.mark.parametrize("name", ["__class__", "__globals__", "grad_fn", "grad", {"node": "x"}, 3])
def test_only_plain_attributes_are_read(name):
    args = [{"node": "x"}, name]
    with pytest.raises(ArtifactError, match="relu: a saved graph may not read attribute"):
        from_json(edited(SAFE, target="builtins.getattr", args=args))
    if type(name) is str:
        with pytest.raises(ArtifactError, match="may not read attribute"):
            to_json(one_node("call_function", getattr, "x", name))
    assert (
        round_trip(one_node("call_function", getattr, "x", "dtype"))(torch.ones(1)) is torch.float32
    )


def test_kept_writes_come_back_and_call_no_other_method():
    gm = one_node("call_function", inplace_, "x", "add_", 2)
    list(gm.graph.nodes)[1].meta["writes"] = True
    again = round_trip(gm)
    assert list(again.graph.nodes)[1].meta["writes"] is True
    assert again(torch.ones(1)) == 3
    name = "inplace_"
    for method in ("__reduce_ex__", "apply_", "__getattribute__", {"node": "x"}):
        with pytest.raises(ArtifactError, match=r"may not call method|must be named by the graph"):
            from_json(edited(SAFE, target=name, args=[{"node": "x"}, method]))
    with pytest.raises(ArtifactError, match="must be named by the graph"):
        kwargs = {"method": "__reduce_ex__"}
        from_json(edited(SAFE, target=name, args=[{"node": "x"}], kwargs=kwargs))


class Foreign(nn.Linear):
    """Not a torch.nn class, though it looks like one."""


def test_modules_of_other_packages_are_refused_both_ways():
    with pytest.raises(ArtifactError, match=r"leaf: a saved graph may not hold a .*\.Foreign"):
        to_json(of_module(Foreign(2, 2)))
    for name in ("subprocess.Popen", "torch.nn.utils.prune.Identity", f"{__name__}.Foreign", "x"):
        data = to_json(of_module(nn.SiLU()))
        data["modules"]["leaf"]["class"] = name
        with pytest.raises(ArtifactError, match="leaf: a saved graph may not hold"):
            from_json(data)
    for name in ("torch.nn.modules.module.warnings", "torch.nn.modules.linear.Tensor"):
        data["modules"]["leaf"]["class"] = name
        with pytest.raises(ArtifactError, match="leaf: a saved graph may not hold"):
            from_json(data)


INJECTIONS = [
    ("nodes", 0, {"target": "x, y=print('x')"}),
    ("nodes", 0, {"target": "class"}),
    ("nodes", 1, {"kwargs": {"a=print('x'), b": 1}}),
    ("nodes", 1, {"kwargs": {"lambda": 1}}),
    ("nodes", 1, {"op": "get_attr", "target": 'a"); print("x'}),
    ("nodes", 1, {"op": "get_attr", "target": "__class__"}),
    ("nodes", 1, {"op": "call_module", "target": "a.__init__"}),
    ("nodes", 1, {"op": "call_method", "target": "relu", "args": []}),
    ("nodes", 1, {"op": "import", "target": "os"}),
    ("nodes", 1, {"args": [{"node": "later"}]}),
    ("nodes", 1, {"name": "x"}),
    ("nodes", 1, {"extra": 1}),
]


@pytest.mark.parametrize(("table", "index", "change"), INJECTIONS)
def test_nothing_but_names_gets_into_generated_code(table, index, change, capsys):
    data = through_text(to_json(SAFE))
    data[table][index].update(change)
    with pytest.raises(ArtifactError):
        from_json(data)
    assert capsys.readouterr().out == ""


def test_node_names_are_made_into_identifiers(capsys):
    data = json.loads(json.dumps(to_json(SAFE)).replace('"relu"', '"relu = print(1)\\n    y"'))
    gm = from_json(data)
    gm(torch.ones(1))
    assert capsys.readouterr().out == ""
