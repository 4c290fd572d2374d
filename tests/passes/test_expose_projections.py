"""Projections of torch.nn's attention, and products with parameters, become layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx.capture.capture import capture
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.passes.expose_projections import expose_projections
from tfmq_fx.passes.fold_weights import fold_weights

WIDTH, STEPS = 16, [1, 5]
# attention and a product of 16 values, in float32, added up in another order
REASSOCIATED = 1e-5


class Around(nn.Module):
    """A small denoiser of tokens (B, 5, 6) around a core (B, 5, 16) -> (B, 5, 16)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time, self.last = (
            nn.Linear(6, WIDTH),
            nn.Linear(1, WIDTH),
            nn.Linear(16, 6),
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(x) + self.time(timestep[:, None].float() / 10)[:, None]
        return self.last(h + self.core(h))

    def core(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Self(Around):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(WIDTH, 4, **{"batch_first": True, **options})

    def core(self, h: Tensor) -> Tensor:
        return self.a(h, h, h)[0]


class Sequence(Self):
    def core(self, h: Tensor) -> Tensor:
        h = h.transpose(0, 1)
        return self.a(h, h, h, need_weights=False)[0].transpose(0, 1)


class Cross(Self):
    def core(self, h: Tensor) -> Tensor:
        other = h[:, :3, : self.a.kdim]
        return self.a(h, other, other)[0]


class Masked(Self):
    def core(self, h: Tensor) -> Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return self.a(h, h, h, attn_mask=mask, need_weights=False)[0]


class Added(Self):
    def core(self, h: Tensor) -> Tensor:
        return self.a(h, h, h, attn_mask=torch.ones(5, 5).triu(1), need_weights=False)[0]


class Padded(Self):
    def core(self, h: Tensor) -> Tensor:
        padding = h[:, :, 0].detach() > 10
        return self.a(h, h, h, key_padding_mask=padding, need_weights=False)[0]


class Weights(Self):
    def core(self, h: Tensor) -> Tensor:
        y, weights = self.a(h, h, h)
        return y + weights.sum(-1, keepdim=True)


class Products(Around):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.gain = (
            nn.Parameter(torch.randn(WIDTH, WIDTH) / 4),
            nn.Parameter(torch.ones(())),
        )
        self.register_buffer("basis", torch.randn(WIDTH, WIDTH))

    def core(self, h: Tensor) -> Tensor:
        normal = F.normalize(self.w, dim=1) * self.gain
        return h @ normal.t() + torch.matmul(h, self.w) + (h @ self.basis) / 100


CASES: dict[str, tuple[Any, list[str]]] = {
    "self": (Self, ["a.in_proj", "a.out_proj"]),
    "no bias": (lambda: Self(bias=False), ["a.in_proj", "a.out_proj"]),
    "sequence first": (lambda: Sequence(batch_first=False), ["a.in_proj", "a.out_proj"]),
    "cross": (Cross, ["a.q_proj", "a.kv_proj", "a.out_proj"]),
    "narrow keys": (
        lambda: Cross(kdim=8, vdim=8),
        ["a.q_proj", "a.k_proj", "a.v_proj", "a.out_proj"],
    ),
    "masked": (Masked, ["a.in_proj", "a.out_proj"]),
    "added mask": (Added, ["a.in_proj", "a.out_proj"]),
    "padded": (Padded, ["a.in_proj", "a.out_proj"]),
    "products": (Products, ["linear", "linear_1"]),
}


def call(t: int = 5, batch: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 5, 6), "timestep": torch.full((batch,), t)}


@pytest.mark.parametrize("name", CASES)
def test_every_projection_is_a_layer_and_outputs_stay(name: str) -> None:
    make, layers = CASES[name]
    model = make().eval()
    gm = capture(model, call(), timestep="timestep").gm
    exposed = expose_projections(gm)
    assert not exposed.declined and exposed.changed == (2 if name == "products" else 1)
    folded = fold_weights(exposed.gm).gm
    names = [site.name for site in find_sites(folded)[0]]
    assert [each for each in names if each not in ("first", "time", "last")] == layers
    again = expose_projections(folded)
    assert again.changed == 0
    with torch.no_grad():
        for batch in (1, 3):
            given = call(batch=batch)
            torch.testing.assert_close(
                folded(*given.values())[0], model(**given), rtol=0, atol=REASSOCIATED
            )
            assert torch.equal(gm(*given.values())[0], model(**given))  # the input is as it was


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Weights, "its attention weights are used"),
        (lambda: Self(add_bias_kv=True), "it adds keys of its own"),
        (lambda: Self(add_zero_attn=True), "it adds keys of its own"),
    ],
)
def test_what_stays_is_named_and_counted(make: Any, reason: str) -> None:
    model = make().eval()
    prepared = tfmq_fx.prepare(model, call(), config="w8a8-dynamic", timesteps=STEPS)
    with pytest.warns(tfmq_fx.CoverageWarning, match="a "):
        done = tfmq_fx.convert(prepared, progress=False)
    assert ["a", f"its projections stay in floating point: {reason}"] in done.record["declined"]
    assert tfmq_fx.report(done).weight_coverage < 0.5


@pytest.mark.parametrize("name", ["self", "cross", "products"])
def test_quantized_saved_and_refreshed(name: str, tmp_path: Path) -> None:
    model = CASES[name][0]().eval()
    prepared = tfmq_fx.prepare(model, call(), config="w8a8", timesteps=STEPS)
    torch.manual_seed(1)
    tfmq_fx.calibrate(prepared, [call(t, 4) for t in STEPS * 4], progress=False)
    done = tfmq_fx.convert(prepared, progress=False)
    buffers = 256 if name == "products" else 0  # a fixed basis is no weight
    total = sum(site["weights"] for site in done.record["sites"].values())
    coverage = tfmq_fx.report(done).weight_coverage
    assert coverage == pytest.approx(total / (total + buffers))
    given = call(1)
    with torch.no_grad():
        expected, found = model(**given), done(**given)
        assert (found - expected).norm() < 0.1 * expected.norm()
        tfmq_fx.save(done, tmp_path / "saved")
        assert torch.equal(tfmq_fx.load(tmp_path / "saved")(**given), found)
        other = CASES[name][0]().eval()
        for parameter in other.parameters():
            parameter.mul_(1.1)
        refreshed, expected = tfmq_fx.refresh(done, other, progress=False), other(**given)
        assert (refreshed(**given) - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_networks_are_exact_saved_and_named(make: Any, tmp_path: Path) -> None:
    class Recurrent(Around):
        def __init__(self) -> None:
            super().__init__()
            self.a = make(WIDTH, WIDTH // 2, 2, batch_first=True, bidirectional=True)

        def core(self, h: Tensor) -> Tensor:
            return self.a(h)[0]

    model = Recurrent().eval()
    folded = tfmq_fx.fold_timesteps(model, STEPS, call())
    given = call(batch=1)
    with torch.no_grad():
        assert torch.equal(folded(**given), model(**given))
        tfmq_fx.save(folded, tmp_path / "saved")
        loaded = tfmq_fx.load(tmp_path / "saved")
        assert torch.equal(loaded(**given), model(**given))
    prepared = tfmq_fx.prepare(model, call(), config="w8a8-dynamic", timesteps=STEPS)
    with pytest.warns(tfmq_fx.CoverageWarning, match="a "):
        done = tfmq_fx.convert(prepared, progress=False)
    assert ["a", f"{make.__name__} keeps its weights in floating point"] in done.record["declined"]
