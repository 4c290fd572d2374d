"""freedom: sizes that a model's code fixes, and rows that are not one for each sample."""

import pytest
import torch
from torch import Tensor, nn

from tfmq_fx import prepare
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.serialization.call_json import call_from_json


class Adds(nn.Module):
    """x + something of t, made by `rows(x, t)`: (batch, 1)."""

    def __init__(self, rows):
        super().__init__()
        self.linear, self.rows = nn.Linear(4, 4), rows

    def forward(self, x, t):
        return self.linear(x) + self.rows(x, t)


def of(batch):
    return {"x": torch.randn(batch, 4), "t": torch.full((batch,), 3.0)}


def answers(found: Captured, given: dict) -> Tensor:
    values, _ = found.call.bind((), given)
    (output,) = found.gm(*values)
    return output


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "rows",
    [
        lambda x, t: torch.tensor([0.5] * t.shape[0])[:, None],
        lambda x, t: torch.zeros(len(x), 1),
        lambda x, t: torch.ones(int(x.size(0)), 1),
        lambda x, t: torch.stack([t[i : i + 1] for i in range(x.shape[0])]),
        lambda x, t: torch.full((int(x.numel()) // 4, 1), 2.0),
    ],
)
def test_a_batch_read_as_a_number_is_that_of_the_example(rows, batch):
    model = Adds(rows).eval()
    found = capture(model, of(batch), timestep="t")
    given = of(batch)
    assert torch.equal(answers(found, given), model(**given))
    with pytest.raises(InputError, match=r"x: dimension 0 was captured as .*, got 5\. Captu"):
        answers(found, of(5))
    given = of(5)  # the remedy
    assert torch.equal(answers(capture(model, of(5), timestep="t"), given), model(**given))


def test_what_fixed_a_size_is_told():
    found = capture(Adds(lambda x, t: torch.zeros(len(x), 1)).eval(), of(2), timestep="t")
    assert any(
        "batch is fixed: captured where Eq(batch, 2) is True" in note for note in found.notes
    )
    assert [spec.shape for spec in found.call.inputs] == [(2, 4), (2,)]
    loaded = call_from_json(found.call.to_dict(), "call")
    assert loaded == found.call
    with pytest.raises(
        InputError, match=r"got 3.*captured where Eq\(batch, 2\) is True \(test_fre"
    ):
        loaded.bind((), of(3))


def test_a_model_that_tells_one_sample_from_several_takes_its_example():
    model = Adds(lambda x, t: t[:, None] if x.shape[0] == 1 else 2 * t[:, None]).eval()
    for batch in (1, 2):
        found, given = capture(model, of(batch), timestep="t"), of(batch)
        assert torch.equal(answers(found, given), model(**given))


class Grid(nn.Module):
    """x (batch, frames, height, channels) with positions of its own axes as inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, t, positions, label=None):
        frames, rows = positions
        where = torch.sin((frames[:, None, None] + rows[None, :, None]).float())
        if label is not None:
            where = where + label[:, None, None, None]
        return self.linear(x + where) + t[:, None, None, None]


def grid(batch, frames, height=4, label=False):
    given = {
        "x": torch.randn(batch, frames, height, 8),
        "t": torch.full((batch,), 5.0),
        "positions": [torch.arange(frames), torch.arange(height)],
    }
    return given | ({"label": torch.arange(batch) / 2} if label else {})


@pytest.mark.parametrize("label", [False, True])
@pytest.mark.parametrize(
    "batch, frames, height", [(1, 1, 4), (2, 2, 4), (1, 2, 4), (2, 3, 4), (3, 2, 3), (1, 1, 1)]
)
def test_rows_of_positions_are_not_samples(batch, frames, height, label):
    model = Grid().eval()
    found = capture(model, grid(batch, frames, height, label), timestep="t")
    shapes = {spec.path: spec.shape for spec in found.call.inputs}
    assert shapes["positions.0"] == (frames,) and shapes["positions.1"] == (height,)
    assert shapes["x"][0] == shapes["t"][0] == "batch"
    assert not label or shapes["label"] == ("batch",)
    for size in (batch, 4):
        given = grid(size, frames, height, label)
        assert torch.equal(answers(found, given), model(**given))


@pytest.mark.parametrize("batch", [1, 2])
def test_only_what_is_named_is_doubled(batch):
    free = {"x": {0: "batch"}, "t": {0: "batch"}}
    found = capture(Grid().eval(), grid(batch, 1), timestep="t", dynamic=free)
    given = grid(3, 1)
    assert answers(found, given).shape == (3, 1, 4, 8)


class Text(nn.Module):
    def __init__(self, fixed=False):
        super().__init__()
        self.query, self.keys = nn.Conv2d(4, 8, 1), nn.Linear(6, 8)
        self.fixed = fixed

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask=None):
        query = self.query(sample).flatten(2).mT + timestep[:, None, None]
        keys = self.keys(encoder_hidden_states)
        if encoder_attention_mask is not None:
            keys = keys * encoder_attention_mask[:, :, None]
        if self.fixed:
            keys = keys + torch.zeros(7, 1)
        return torch.softmax(query @ keys.mT, -1) @ keys


def text(tokens, masked=False):
    given = {
        "sample": torch.randn(2, 4, 3, 3),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, tokens, 6),
    }
    return given | ({"encoder_attention_mask": torch.ones(2, tokens)} if masked else {})


@pytest.mark.parametrize("masked", [False, True])
def test_the_length_of_the_text_is_free_if_wanted(masked):
    model = Text().eval()
    wanted = ("batch", "text")
    found = capture(model, text(7, masked), timestep="timestep", dynamic=wanted)
    for tokens in (7, 2, 11):
        given = text(tokens, masked)
        assert torch.equal(answers(found, given), model(**given))
    with pytest.raises(InputError, match="encoder_hidden_states: dimension 1 was captured as 7"):
        answers(capture(model, text(7), timestep="timestep"), text(11))


def test_text_whose_length_the_code_fixes_stays_as_it_was():
    found = capture(Text(fixed=True).eval(), text(7), timestep="timestep", dynamic=("text",))
    assert found.call.inputs[2].shape == (2, 7, 6)
    assert any(note.startswith("text is fixed: captured where Eq(text, 7)") for note in found.notes)


def test_sizes_that_nobody_knows_are_named():
    known = "batch, text, spatial, frames"
    with pytest.raises(ConfigError, match=rf"unknown .'words'.; known are {known}"):
        prepare(Text().eval(), text(7), dynamic=("words",))
