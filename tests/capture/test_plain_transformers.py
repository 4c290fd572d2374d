"""plain_transformers: torch.nn's transformer layers are seen through and run as code."""

import pytest
import torch
from torch import nn

from tfmq_fx import convert, fold_timesteps, load, prepare, save

X, T, TIMES = torch.randn(2, 10, 6), torch.tensor([900, 900]), [900, 500]


class Motion(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.i, self.t, self.core, self.o = (
            nn.Linear(6, 16),
            nn.Linear(1, 16),
            core,
            nn.Linear(16, 6),
        )

    def forward(self, x, t):
        return self.o(self.core(self.i(x) + self.t(t[:, None].float() / 1000)[:, None]))


def layer(**options):
    return nn.TransformerEncoderLayer(16, 2, 32, **options)


CORES = {
    "encoder": lambda: nn.TransformerEncoder(layer(batch_first=True), 2),
    "no nesting": lambda: nn.TransformerEncoder(
        layer(batch_first=True), 1, norm=nn.LayerNorm(16), enable_nested_tensor=False
    ),
    "layer": lambda: layer(batch_first=True, activation="gelu"),
    "norm first": lambda: layer(norm_first=True, bias=False),
}


# attention's own projections stay in floating point, and convert() says so
@pytest.mark.filterwarnings("ignore::tfmq_fx.conversion.coverage.CoverageWarning")
@pytest.mark.parametrize("name", CORES)
def test_captured_folded_saved_and_quantized(name, tmp_path):
    torch.manual_seed(0)
    model = Motion(CORES[name]()).eval()
    folded = fold_timesteps(model, TIMES, (X[:1], T[:1]))
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert enabled
    with torch.no_grad():
        fused = model(X[:1], T[:1])
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert torch.equal(folded(X[:1], T[:1]), model(X[:1], T[:1]))
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
        # the fused kernel adds up in another order: 16 to 32 terms of size 1 in float32
        torch.testing.assert_close(folded(X[:1], T[:1]), fused, rtol=0, atol=1e-5)
    assert any("fused kernel" in note for note in folded.record["capture"]["notes"])
    save(folded, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(X, T), folded(X, T))
    prepared = prepare(model, (X, T), config="w8a8-dynamic", timesteps=TIMES)
    quantized = convert(prepared, progress=False)
    sites = set(quantized.record["sites"])
    inner = {name for name, part in model.core.named_modules() if type(part) is nn.Linear}
    assert len(inner) >= 2 and {f"core.{name}" for name in inner} <= sites
