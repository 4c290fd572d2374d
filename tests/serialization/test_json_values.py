import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.core.errors import ArtifactError, GraphError
from tfmq_fx.serialization.json_values import (
    decode,
    encode,
    fields,
    naming,
    without_infinities,
    words,
)

few = settings(deadline=None, max_examples=60)


def through_text(data):
    return json.loads(json.dumps(data, allow_nan=False))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.just(...),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:1"), torch.device("cuda")]),
    st.sampled_from([torch.channels_last, torch.contiguous_format, torch.preserve_format]),
    st.just(torch.strided),
    st.lists(st.integers(0, 9)).map(torch.Size),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none()),
)
structures = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    ),
    max_leaves=12,
)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return repr(a) == repr(b)  # tells -0.0 from 0.0, and nan is nan
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


@few
@given(structures)
def test_values_come_back_equal_and_of_the_same_type(value):
    assert same(decode(through_text(encode(value, "x")), "x"), value)


def test_damaged_values_are_refused():
    for data in (
        {"tuple": 3},
        {"size": [1 << 63]},
        {"size": ["1"]},
        {"dict": [[1, 2, 3]]},
        {"dict": [[1, 2], [1, 3]]},
        {"slice": [1]},
        {"ellipsis": 1},
        {"float": "1e5"},
        {"device": "gpu-room"},
        {"device": 3},
        {"dtype": "onnx"},
        {"dtype": ["float32"]},
        {"layout": "float32"},
        {"pickle": "x"},
        {"dtype": "load"},
        {"dtype": "Tensor"},
        {},
        {"a": 1, "b": 2},
    ):
        with pytest.raises(ArtifactError, match=r"x: (damaged value|a key|.* is no device)"):
            decode(data, "x")


def test_json_has_no_infinities_of_its_own():
    assert without_infinities({"a": [math.inf, -math.inf, 1.5], "b": (True, None)}) == {
        "a": ["inf", "-inf", 1.5],
        "b": [True, None],
    }


def test_fields_have_their_keys_and_types():
    data = {"name": "a", "size": 3, "more": None}
    assert fields(data, "here", "more", name=str, size=float) is data
    for changed, message in (
        ([], "here: expected an object, found"),
        ({"name": "a"}, "here: missing keys .'more', 'size'."),
        (data | {"other": 1}, "here: unknown keys .'other'."),
        (data | {"size": True}, "here.size: expected int or null, found True"),
    ):
        with pytest.raises(ArtifactError, match=message):
            fields(changed, "here", name=str, size=int | None, more=object)
    assert words(["a", "b"], "here") == ("a", "b")
    with pytest.raises(ArtifactError, match=r"here: .'a', 1. is no list of names"):
        words(["a", 1], "here")


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError("x"), GraphError("x")])
def test_whatever_damaged_data_raises_becomes_one_error_with_the_place(error):
    with (
        pytest.raises(ArtifactError, match=r"^file: place: .*x") as caught,
        naming("file"),
        naming("place"),
    ):
        raise error
    with pytest.raises(ArtifactError) as again, naming("file"):
        raise caught.value
    assert again.value is caught.value  # named once is enough
