"""Models that take their timestep in another form than one number for each sample."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx.core.errors import ArtifactError, InputError
from tfmq_fx.serialization.call_json import call_from_json

STEPS = [1, 5, 9]


class OneNumber(nn.Module):
    """Scale and shift by halves of an embedding of a 0-d timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj, self.out = nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        scale, shift = self.proj(self.embed(timestep)).chunk(2, dim=0)
        return self.out(x * (1 + scale) + shift)


class Column(nn.Module):
    """Take timesteps as a column (batch, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if timestep.dim() != 2:
            raise ValueError("timesteps must be a column")
        return self.out(x + self.embed(torch.sin(timestep.float() * torch.arange(8)))[:, None])


class PerToken(nn.Module):
    """Take a timestep for each token, (batch, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep.flatten()[:, None].float() * torch.arange(8) / 10
        e = self.proj(F.silu(self.embed(torch.sin(angles)))).unflatten(0, timestep.shape)
        scale, shift = e.chunk(2, dim=-1)
        return self.out(x * (1 + scale) + shift)


def call(kind: type[nn.Module], batch: int = 2, t: int = 5) -> dict[str, Any]:
    steps = {
        OneNumber: torch.tensor(t),
        Column: torch.full((batch, 1), t),
        PerToken: torch.tensor([[0, 0, t, t]] * batch),
    }
    return {"x": torch.randn(batch, 4, 8), "timestep": steps[kind]}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", [OneNumber, Column, PerToken])
def test_the_graph_is_exact_at_any_batch(kind: type[nn.Module], batch: int) -> None:
    model = kind().eval()
    prepared = tfmq_fx.prepare(model, call(kind, batch), config="fp", timesteps=STEPS)
    with torch.no_grad():
        for other in (1, 2, 3):
            given = call(kind, other, 9)
            assert torch.equal(prepared(**given), model(**given))


@pytest.mark.parametrize(
    ("kind", "tabled"), [(OneNumber, ["embed", "proj"]), (Column, ["embed"]), (PerToken, [])]
)
def test_what_depends_on_one_number_is_tabled(kind: type[nn.Module], tabled: list[str]) -> None:
    model = kind().eval()
    folded = tfmq_fx.fold_timesteps(model, STEPS, call(kind))
    assert folded.record["block"]["modules"] == tabled
    with torch.no_grad():
        for batch in (1, 3):
            given = call(kind, batch, 1)
            expected, found = model(**given), folded(**given)
            exact = batch == 1 or kind is not Column  # rows are computed at batch one
            torch.testing.assert_close(found, expected, rtol=0, atol=0 if exact else 1e-5)
    with torch.no_grad():  # a timestep that was not named: its rows are computed from the source
        given = call(kind, 1, 7)
        assert torch.equal(folded(**given), model(**given))


@pytest.mark.parametrize("kind", [OneNumber, Column, PerToken])
def test_quantized_saved_and_bound(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    prepared = tfmq_fx.prepare(model, call(kind), config="w8a8", timesteps=STEPS)
    calls = [call(kind, 4, t) for t in STEPS for _ in range(4)]
    tfmq_fx.calibrate(prepared, calls, progress=False)
    done = tfmq_fx.convert(prepared, progress=False)
    assert tfmq_fx.report(done).weight_coverage == 1.0
    given = calls[0]
    with torch.no_grad():
        expected, found = model(**given), done(**given)
        assert (found - expected).norm() < 0.03 * expected.norm()  # 30 dB at 8 bits
        tfmq_fx.save(done, tmp_path / "saved")
        loaded = tfmq_fx.load(tmp_path / "saved")
        assert loaded.call == done.call and torch.equal(loaded(**given), found)
        bound = tfmq_fx.bind_request(model, torch.tensor(STEPS), call(kind))
        assert torch.equal(bound(**given), model(**given)) or kind is Column


def test_a_model_of_one_number_refuses_a_row_of_them() -> None:
    prepared = tfmq_fx.prepare(OneNumber().eval(), call(OneNumber), config="fp", timesteps=STEPS)
    with pytest.raises(InputError, match="one number for all samples; give a number or a 0-d"):
        prepared(torch.randn(2, 4, 8), torch.tensor([1, 5]))
    assert prepared(torch.randn(2, 4, 8), 5).shape == (2, 4, 8)


def test_ranges_of_tokens_go_by_the_largest_timestep_of_a_sample() -> None:
    prepared = tfmq_fx.prepare(PerToken().eval(), call(PerToken), config="w8a8", timesteps=STEPS)
    tfmq_fx.calibrate(prepared, [call(PerToken, t=t) for t in STEPS], progress=False)
    assert {step for each in prepared.observers() for step in each.seen} == {1, 5, 9}
    assert any("number for each token" in note for note in prepared.gm.meta["capture"]["notes"])


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("timestep_form", [2], "is no shape of a timestep"),
        ("timestep_form", 3, "is no shape of a timestep"),
        ("per_token", 7, "is no name"),
        ("per_token", "x2", "the arguments hold 2"),
        ("per_token", "x", "the arguments hold 2"),
    ],
)
def test_forms_that_no_model_has_are_refused_in_files(entry: str, value: Any, text: str) -> None:
    prepared = tfmq_fx.prepare(Column().eval(), call(Column), config="fp", timesteps=STEPS)
    data = prepared.call.to_dict() | {entry: value}
    with pytest.raises(ArtifactError, match=text):
        call_from_json(data, "call")
