"""checkpoint: parts come back whole or not at all, and only to the conversion they belong to."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.quant.test_modules import quantized
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.serialization.checkpoint import (
    Checkpoint,
    Part,
    digest,
    finished,
    record,
    rounded_state,
    seeded_generator,
    with_rounded_state,
)

SUBJECT = {"recipe": {"name": "w4a8", "reconstruction": {"iters": 60}}, "model": "abc"}


def part(seed=0, note="why"):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (5,), generator=generator, dtype=torch.uint8)
    bias = torch.randn(3, generator=generator).half()
    states = {
        "down.0": {"codes": codes, "bias": bias},
        "up": {"weight_scale": torch.rand(2, 3, generator=generator)},
    }
    return Part(states, {"before": 0.1 + seed, "after": math.nan}, note)


def same(a, b):
    assert a.note == b.note and repr(a.errors) == repr(b.errors)
    assert list(a.states) == list(b.states)
    for name, state in a.states.items():
        assert state.keys() == b.states[name].keys()
        assert all(torch.equal(v, b.states[name][k]) for k, v in state.items())
        assert all(v.dtype == b.states[name][k].dtype for k, v in state.items())
    return True


def test_parts_come_back_as_they_went(tmp_path):
    parts = {"a": part(), "b/c d.é": part(1), "a" * 400: Part({}, {}, "")}
    for name, original in parts.items():
        assert Checkpoint(tmp_path / "new" / "er", SUBJECT).load(name) is None
        Checkpoint(tmp_path / "new" / "er", SUBJECT).save(name, original)
        found = Checkpoint(tmp_path / "new" / "er", SUBJECT)
        assert same(found.load(name), original) and found.taken == [name] and not found.damaged


def test_a_finished_part_is_not_made_again(tmp_path):
    checkpoint, made = Checkpoint(tmp_path, SUBJECT), []

    def make():
        made.append(1)
        return part(len(made))

    first = finished(checkpoint, "x", make)
    assert same(finished(checkpoint, "x", make), first) and made == [1]
    assert same(finished(None, "x", make), part(2)) and made == [1, 1]
    assert record(checkpoint) == {"checkpoint": {"taken": ["x"], "made again": []}}
    assert record(None) == {}


def test_groups_keep_equal_names_apart(tmp_path):
    checkpoint = Checkpoint(tmp_path, SUBJECT)
    rounding, blocks = checkpoint.within("rounding"), checkpoint.within("blocks")
    rounding.save("mid", part(1))
    assert blocks.load("mid") is None and checkpoint.load("mid") is None
    assert same(checkpoint.within("rounding").load("mid"), part(1))
    assert rounding.taken == blocks.taken == checkpoint.taken == []


@pytest.mark.parametrize(
    "other, message",
    [
        ({"model": "xyz"}, r"\(model: 'abc' there, 'xyz' here\)"),
        ({"model": "x" * 64}, r"\(another model\)"),
        ({"recipe": {"name": "w4a8", "reconstruction": {"iters": 20}}}, "iters: 60 there, 20 here"),
        ({"format_version": 2}, r"format_version: 1 there, 2 here"),
        ({"more": 1}, "more: None there, 1 here"),
    ],
)
def test_the_checkpoint_of_another_conversion_is_refused(tmp_path, other, message):
    Checkpoint(tmp_path, SUBJECT)
    with pytest.raises(ConfigError, match=message) as caught:
        Checkpoint(tmp_path, SUBJECT | other)
    assert str(tmp_path) in str(caught.value) and "delete this one" in str(caught.value)


def test_foreign_and_unusable_directories_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty and holds no checkpoint"):
        Checkpoint(tmp_path, SUBJECT)
    with pytest.raises(ConfigError, match=r"no checkpoint can be kept in .*thesis\.tex"):
        Checkpoint(tmp_path / "thesis.tex", SUBJECT)
    Checkpoint(tmp_path / "own", SUBJECT)
    (tmp_path / "own" / "checkpoint.json").write_text('{"recipe"')
    with pytest.raises(ConfigError, match=r"checkpoint\.json is damaged .*delete the directory"):
        Checkpoint(tmp_path / "own", SUBJECT)


@given(data=st.data())
def test_damaged_parts_are_not_trusted(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    Checkpoint(directory, SUBJECT).save("x", part())
    (path,) = directory.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    checkpoint = Checkpoint(directory, SUBJECT)
    found = checkpoint.load("x")
    # a flipped bit may leave the meaning of the header as it was (white space), never of the rest
    assert (found is None and checkpoint.damaged == ["x"]) or same(found, part())
    checkpoint.save("x", part())
    assert same(checkpoint.load("x"), part())


def test_a_part_under_another_name_is_not_taken(tmp_path):
    checkpoint = Checkpoint(tmp_path, SUBJECT)
    checkpoint.save("x", part())
    (path,) = tmp_path.glob("*.safetensors")
    checkpoint.save("y", part(1))
    (other,) = set(tmp_path.glob("*.safetensors")) - {path}
    path.rename(other)
    assert checkpoint.load("y") is None and checkpoint.damaged == ["y"]


def test_what_an_interrupted_write_left_does_not_disturb(tmp_path):
    checkpoint = Checkpoint(tmp_path, SUBJECT)
    checkpoint.save("x", part())
    (path,) = tmp_path.glob("*.safetensors")
    path.rename(tmp_path / f".{path.name}.123")
    assert Checkpoint(tmp_path, SUBJECT).load("x") is None
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["checkpoint.json"]


def test_digests_tell_values_apart():
    x = torch.arange(6.0)
    values = [
        x,
        x.view(2, 3),
        x.double(),
        x.to(torch.complex64),
        -x,
        x[:0],
        x > 2,
        [x],
        [x, x],
        [[x], x],
        {"a": x},
        {"b": x},
        1,
        1.0,
        "1",
        True,
        None,
        [1, 11],
        [11, 1],
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(x) == digest(x.clone()) == digest(torch.stack([x, x], 1)[:, 0])
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_a_layer_gets_its_rounded_state_back():
    layer = quantized(nn.Linear(6, 4), bits=4, act_bits=8)
    other = quantized(nn.Linear(6, 4), bits=4, act_bits=8)
    other.set_static_range(0.25, 3)
    made = with_rounded_state(other, rounded_state(layer))
    assert torch.equal(made.weight, layer.weight) and torch.equal(made.bias, layer.bias)
    assert made.codes is not layer.codes and float(made.act_scale) == 0.25
    assert not torch.equal(other.weight, made.weight)
    assert "bias" not in rounded_state(quantized(nn.Linear(6, 4, bias=False), bits=4))


def test_random_numbers_of_a_part_depend_on_the_seed_and_its_name_alone():
    drawn = [
        torch.rand(4, generator=seeded_generator(seed, name)).tolist()
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert drawn[0] == drawn[1] and len({tuple(d) for d in drawn}) == 3


def test_a_part_sets_nothing_but_what_rounding_decides(tmp_path):
    Checkpoint(tmp_path, {}).save("a", Part({"layer": {"forward": torch.zeros(1)}}, {}))
    again = Checkpoint(tmp_path, {})
    assert again.load("a") is None and again.damaged == ["a"]


def test_pipes_and_deep_nesting_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.json")
    with pytest.raises(ConfigError, match=r"checkpoint.json is damaged .*is a pipe"):
        Checkpoint(tmp_path, {})
    (tmp_path / "checkpoint.json").unlink()
    (tmp_path / "checkpoint.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"nested deeper"):
        Checkpoint(tmp_path, {})
