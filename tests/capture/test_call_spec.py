"""CallSpec: what a call may look like, what is refused in which words, and the JSON round trip."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq_fx.capture.call_spec import Argument, CallSpec, Guard
from tfmq_fx.capture.input_checks import Input
from tfmq_fx.capture.nested_values import Branch, Const, Leaf, evaluate, outline, rebuild
from tfmq_fx.core.errors import InputError


@dataclasses.dataclass
class Output:
    sample: Tensor
    extra: Any = None


class Pair(NamedTuple):
    first: Any
    second: Any


def spec(dtype: torch.dtype = torch.int64, **changes: Any) -> CallSpec:
    """forward(x, t, mode="a", cond={"c": ..., "k": 1}, return_dict=True); x is (batch, 4)."""
    cond = Branch("dict", ("c", "k"), (Leaf(0), Const(1)))
    values: dict[str, Any] = {
        "arguments": (
            Argument("x", Leaf(0), 0, positional=True, omittable=False),
            Argument("t", Leaf(0), 1, positional=True, omittable=False),
            Argument("mode", Const("a"), 2, positional=True, omittable=True),
            Argument("cond", cond, 2, positional=False, omittable=False),
            Argument("return_dict", Const(True), 3, positional=True, omittable=True),
        ),
        "inputs": (
            Input("x", "x", ("batch", 4), torch.float32, "cpu"),
            Input("t", "t", ("batch",), dtype, "cpu"),
            Input("cond_c", "cond.c", ("batch", 2), torch.float32, "cpu"),
        ),
        "timestep": "t",
        "output": Branch("object", ("sample", "extra"), (Leaf(0), Const(None)), Output),
        "return_dict": True,
    }
    return CallSpec(**{**values, **changes})


def cond(batch: int = 3) -> dict[str, Any]:
    return {"c": torch.zeros(batch, 2), "k": 1}


def bind(*args: Any, of: CallSpec | None = None, **kwargs: Any) -> list[Tensor]:
    return (of or spec()).bind(args, kwargs)[0]


@pytest.mark.parametrize(
    "t", [5, 5.0, torch.tensor(5), torch.tensor([5]), torch.full((3,), 5, dtype=torch.int32)]
)
def test_every_form_of_the_timestep(t: Any) -> None:
    values = bind(torch.zeros(3, 4), t, cond=cond())
    assert [tuple(value.shape) for value in values] == [(3, 4), (3,), (3, 2)]
    assert values[1].dtype == torch.int64 and values[1].tolist() == [5, 5, 5]


def test_float_timesteps_take_integers() -> None:
    float_spec = spec(torch.float32)
    for t in (5, 0.25, torch.tensor(5), torch.tensor([0.25, 0.5, 0.75])):
        assert bind(torch.zeros(3, 4), t, cond=cond(), of=float_spec)[1].dtype == torch.float32
    assert bind(torch.zeros(3, 4), 0.25, cond=cond(), of=float_spec)[1].tolist() == [0.25] * 3


X = torch.zeros(3, 4)
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((X, 1), {}, "missing argument 'cond'"),
    ((), {"t": 1, "cond": cond()}, "missing argument 'x'"),
    ((X, 1), {"cond": cond(), "z": 1}, "no argument 'z'; the model takes x, t, mode, cond"),
    ((X, 1), {"cond": cond(), "x": X}, "argument 'x' is given twice"),
    ((X, 1, "a", True, 1), {"cond": cond()}, "5 positional arguments given, at most 4 taken"),
    ((None, 1), {"cond": cond()}, "x: expected a tensor, got None"),
    ((X[0], 1), {"cond": cond()}, r"x: expected 2 dimensions \('batch', 4\), got 1 \(4,\)"),
    ((X[:, :3], 1), {"cond": cond()}, "x: dimension 1 was captured as 4, got 3"),
    ((X.double(), 1), {"cond": cond()}, "x: captured for torch.float32, got torch.float64"),
    ((X.to("meta"), 1), {"cond": cond()}, "x: captured for device cpu, got meta"),
    ((X, 1), {"cond": cond(2)}, "cond.c: dimension 0 is 2, but batch is 3 in another input"),
    ((X, 1, "b"), {"cond": cond()}, "mode: captured as the constant 'a', got 'b'"),
    ((X, 1, X), {"cond": cond()}, "mode: captured as the constant 'a', got a tensor"),
    ((X, 1), {"cond": {**cond(), "k": 2}}, "cond.k: captured as the constant 1, got 2"),
    ((X, 1), {"cond": {"c": X}}, r"cond: expected a dict with \['c', 'k'\], got keys \['c'\]"),
    ((X, 1), {"cond": X}, r"cond: expected a dict with \['c', 'k'\], got Tensor"),
    ((X, 0.5), {"cond": cond()}, r"t: captured for integer timesteps .*, got 0.5"),
    ((X, float("nan")), {"cond": cond()}, r"t: captured for integer timesteps .*, got nan"),
    ((X, torch.tensor(5.0)), {"cond": cond()}, "t: captured for torch.int64, got torch.float32"),
    ((X, torch.zeros(2).long()), {"cond": cond()}, "t: 2 timesteps for a batch of 3"),
    ((X, torch.zeros(3, 1)), {"cond": cond()}, r"t: expected a number, a 0-d tensor or .*\(3, 1\)"),
    ((X, "5"), {"cond": cond()}, "t: expected a number, .*, got str"),
    ((X, True), {"cond": cond()}, "t: expected a number, .*, got bool"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSED, ids=lambda item: str(item)[:30])
def test_refusals(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec().bind(args, kwargs)


def test_an_omitted_constant_that_is_not_the_default() -> None:
    scale = Argument("scale", Const(0.5), 3, positional=True, omittable=False)
    strict = spec(arguments=(*spec().arguments, scale))
    with pytest.raises(InputError, match=r"'scale' was captured as 0\.5, which is not its default"):
        bind(X, 1, cond=cond(), of=strict)
    bind(X, 1, cond=cond(), scale=0.5, of=strict)


def test_guards() -> None:
    guard = Guard(("eq", ("mod", "batch", 2), 0), True, "Eq(Mod(batch, 2), 0)", "unet.py:7")
    guarded = spec(guards=(guard,))
    bind(torch.zeros(4, 4), 1, cond=cond(4), of=guarded)
    with pytest.raises(InputError, match=r"Mod\(batch, 2\), 0\) is True \(tested at unet.py:7\)"):
        bind(X, 1, cond=cond(), of=guarded)


def test_output_forms() -> None:
    x = torch.zeros(1)
    assert spec().bind((X, 1), {"cond": cond(), "return_dict": False})[1] is False
    assert spec().bind((X, 1), {"cond": cond()})[1] is True
    assert spec().rebuild([x]) == Output(x)
    assert spec().rebuild([x], return_dict=False) == (x,)
    assert spec(output=Leaf(0), return_dict=None).rebuild([x], return_dict=False) is x


def test_moved() -> None:
    moved = spec(torch.float32).moved(device="cuda", dtype=torch.float16)
    assert [item.dtype for item in moved.inputs] == [torch.float16, torch.float32, torch.float16]
    assert {item.device for item in moved.inputs} == {"cuda"}


nested = st.recursive(
    st.integers() | st.text(max_size=3) | st.none() | st.just("tensor"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(Output, inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


def _with_tensors(value: Any) -> Any:
    if value == "tensor":
        return torch.zeros(1)
    if isinstance(value, Output):
        return Output(_with_tensors(value.sample), _with_tensors(value.extra))
    if isinstance(value, Pair):
        return Pair(*map(_with_tensors, value))
    if isinstance(value, dict):
        return {key: _with_tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_tensors, value))
    return value


@settings(deadline=None, max_examples=50)
@given(value=nested.map(_with_tensors))
def test_outline_and_rebuild_are_inverse(value: Any) -> None:
    structure, leaves = outline(value)
    again = rebuild(structure, [leaf for _, leaf in leaves])
    assert type(again) is type(value)
    same, others = outline(again)
    assert same == structure
    assert all(a is b for (_, a), (_, b) in zip(leaves, others, strict=True))


@given(a=st.integers(1, 99), b=st.integers(1, 99))
def test_size_expressions(a: int, b: int) -> None:
    sizes = {"a": a, "b": b}
    assert evaluate(("floordiv", ("add", "a", 1), "b"), sizes) == (a + 1) // b
    assert evaluate(("and", ("lt", "a", "b"), ("not", ("eq", "a", 3))), sizes) == (a < b and a != 3)
    assert evaluate(("or", ("ge", "a", "b"), ("ne", ("max", "a", "b"), "b")), sizes) == (a >= b)


@pytest.mark.parametrize("captured", [Const(None), Branch("dict", (), ())])
def test_no_options_are_none_or_an_empty_dict(captured: Any) -> None:
    x, t = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    base = spec()
    for name, same in (("attention_kwargs", True), ("control", False)):
        last = Argument(name, captured, 3, positional=False, omittable=False)
        made = spec(arguments=(*base.arguments, last))
        for value in (None, {}):
            if same or value == rebuild(captured, ()):
                assert len(bind(x, t, of=made, cond=cond(), **{name: value})) == 3
            else:
                with pytest.raises(InputError, match=r"control: (captured|expected)"):
                    bind(x, t, of=made, cond=cond(), **{name: value})
        with pytest.raises(InputError, match=name):
            bind(x, t, of=made, cond=cond(), **{name: {"scale": 1.0}})


@pytest.mark.parametrize(
    ("dtype", "t", "message"),
    [
        (
            torch.int64,
            2**70,
            r"for torch\.int64, which cannot hold 1180591620717411303424",
        ),
        (torch.int64, -(2**70), "cannot hold -1180591620717411303424"),
        (torch.int64, 1e300, r"cannot hold 1e\+300. Give a timestep that it holds, or capture"),
        (torch.int32, 2**31, "cannot hold 2147483648"),
        (torch.float32, 1e300, r"captured for torch\.float32, which cannot hold 1e\+300"),
        (torch.float16, 70000, "cannot hold 70000"),
        (torch.bfloat16, 999, "cannot hold 999"),  # 1000 would be its neighbour
        (torch.bfloat16, torch.tensor(999), "cannot hold 999"),
        (torch.float32, torch.tensor([0, 2**24 + 1, 1]), "cannot hold 16777217"),
        (torch.int64, torch.tensor([1 + 2j, 1, 1]), r"got a torch\.complex64 tensor"),
        (torch.float32, torch.tensor(1 + 0j), r"got a torch\.complex64 tensor"),
    ],
)
def test_a_timestep_that_the_dtype_cannot_hold_is_refused(
    dtype: torch.dtype, t: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bind(torch.zeros(3, 4), t, cond=cond(), of=spec(dtype))


@pytest.mark.parametrize(
    ("dtype", "t"),
    [
        (torch.bfloat16, 1000),
        (torch.bfloat16, 2**40),
        (torch.float16, 2048),
        (torch.float32, 2**24),
        (torch.float32, 0.1),
        (torch.float32, float("inf")),
        (torch.int64, 2**63 - 1),
        (torch.float64, 1e300),
        (torch.bfloat16, torch.tensor([0, 500, 1000])),
    ],
)
def test_a_timestep_that_the_dtype_holds_arrives(dtype: torch.dtype, t: Any) -> None:
    found = bind(torch.zeros(3, 4), t, cond=cond(), of=spec(dtype))[1]
    wanted = t.to(dtype) if isinstance(t, Tensor) else torch.tensor(t, dtype=dtype)
    assert torch.equal(found, wanted.expand(3))
