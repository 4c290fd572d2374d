"""Time embeddings with a row for each frame before their projection are tabled like any other."""

import pytest
import torch
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx.core.config import TemporalSpec
from tfmq_fx.diagnostics.feature_errors import feature_errors
from tfmq_fx.ir.row_copies import rows_per_sample

STEPS, FRAMES = torch.tensor([1, 5, 9]), 3
ADJACENT = {
    "repeat_interleave": lambda e, f: e.repeat_interleave(f, dim=0),
    "flatten": lambda e, f: e.unsqueeze(1).expand(-1, f, -1).flatten(0, 1),
    "reshape": lambda e, f: e[:, None].expand(e.shape[0], f, 16).reshape(e.shape[0] * f, -1),
    "other rows": lambda e, f: (e[:, None] + torch.arange(f)[None, :, None]).reshape(-1, 16),
}
APART = {
    "repeat": lambda e, f: e.repeat(f, 1),
    "cat": lambda e, f: torch.cat([e] * f),
    "view": lambda e, f: e.repeat(f, 1, 1).view(-1, 16),
}


class Frames(nn.Module):
    """Project a time embedding that is repeated for each frame of x (B, C, F, H, W)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.proj = nn.Linear(8, 16), nn.Linear(16, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        b, c, f, h, w = x.shape
        angles = timestep[:, None].float() * torch.arange(8) / 10
        e = self.proj({**ADJACENT, **APART}[self.how](self.embed(torch.sin(angles)), f))
        if self.how in APART:
            frames = x.permute(2, 0, 1, 3, 4).reshape(f * b, c, h, w)
            return self.conv(frames + e.view(e.shape[0], -1, 1, 1)).reshape(f, b, c, h, w)
        frames = x.permute(0, 2, 1, 3, 4).reshape(b * f, c, h, w)
        return self.conv(frames + e.view(e.shape[0], -1, 1, 1)).reshape(b, f, c, h, w)


def call(batch: int = 2, t: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 4, FRAMES, 4, 4), "timestep": torch.full((batch,), t)}


@pytest.mark.parametrize("how", [*ADJACENT, *APART])
def test_rows_of_frames_are_tabled_and_exact_at_batch_one(how: str) -> None:
    model = Frames(how).eval()
    folded = tfmq_fx.fold_timesteps(model, STEPS, call())
    assert folded.record["block"]["modules"] == ["embed", "proj"]
    assert folded.record["block"]["declined"] == []
    with torch.no_grad():
        for t in STEPS.tolist():
            one = call(1, t)
            assert torch.equal(folded(**one), model(**one))
        x, t = torch.randn(3, 4, FRAMES, 4, 4), STEPS.flip(0)
        torch.testing.assert_close(folded(x, t), model(x, t), rtol=0, atol=1e-5)  # float32 sums
        other = tfmq_fx.refresh(folded, model, timesteps=[2, 5])
        one = call(1, 2)
        assert torch.equal(other(**one), model(**one))


def test_other_rows_than_copies_are_all_kept() -> None:
    for how, width in (("other rows", 4 * FRAMES), ("repeat_interleave", 4)):
        folded = tfmq_fx.fold_timesteps(Frames(how).eval(), STEPS, call())
        table = folded.gm.temporal_table
        # equal rows are products of equal inputs; a library that rounds them otherwise keeps all
        assert table.shape[1] in (width, 4 * FRAMES) and len(table) == 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("how", ["reshape", "repeat", "other rows"])
def test_a_graph_for_one_batch_size_has_tables_as_well(how: str, batch: int) -> None:
    model = Frames(how).eval()
    prepared = tfmq_fx.prepare(model, call(batch), config="fp", timesteps=STEPS, dynamic=())
    folded = tfmq_fx.convert(prepared, progress=False)
    assert folded.record["block"]["modules"] == ["embed", "proj"]
    x, t = torch.randn(batch, 4, FRAMES, 4, 4), STEPS[:batch]
    with torch.no_grad():
        torch.testing.assert_close(folded(x, t), model(x, t), rtol=0, atol=1e-5)
        same = call(batch, 9)
        assert torch.equal(folded(**same)[:1], model(**same)[:1])


def test_a_value_that_only_looks_like_rows_of_samples_is_declined() -> None:
    class TwoWaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(8, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            angles = timestep[0].float() * torch.arange(1, 9) / 10
            waves = self.embed(torch.stack([torch.sin(angles), torch.cos(angles)]))
            return self.out(x) + waves[0, :, None, None] * waves[1, :, None, None]

    x = {"x": torch.randn(2, 4, 4, 4), "timestep": torch.tensor([5, 5])}
    model = TwoWaves().eval()
    prepared = tfmq_fx.prepare(model, x, config="fp", timesteps=STEPS, dynamic=())
    folded = tfmq_fx.convert(prepared, progress=False)
    reasons = [reason for _, reason in folded.record["passes"][-1]["declined"]]
    assert not folded.record["passes"][-1]["changed"], reasons
    with torch.no_grad():
        assert torch.equal(folded(**x), model(**x))


@pytest.mark.parametrize("mode", ["cache", "tib"])
@pytest.mark.parametrize("how", ["reshape", "repeat", "other rows"])
def test_features_with_rows_of_frames_take_every_form(how: str, mode: str) -> None:
    torch.manual_seed(0)
    model = Frames(how).eval()
    recipe = tfmq_fx.Config(name="test", temporal=TemporalSpec(mode=mode, tiar_iters=3))
    prepared = tfmq_fx.prepare(model, call(), config=recipe, timesteps=STEPS)
    tfmq_fx.calibrate(prepared, [call(t=int(t)) for t in STEPS], progress=False)
    done = tfmq_fx.convert(prepared, progress=False)
    x, t = torch.randn(3, 4, FRAMES, 4, 4), STEPS
    with torch.no_grad():
        expected = model(x, t)
        error = (done(x, t) - expected).norm() / expected.norm()
    assert error < 0.05  # 8 bits: 1 / 255 of the range in each of three layers
    errors = feature_errors(prepared.gm, done.gm, STEPS)
    assert [e.name for e in errors] == ["proj"] and float(errors[0].errors.max()) < 0.05
    retimed = tfmq_fx.refresh(done, model, timesteps=[1, 3, 9])
    with torch.no_grad():
        assert retimed(x, torch.tensor([1, 3, 9])).shape == expected.shape


def test_multiples_of_the_batch() -> None:
    assert rows_per_sample(6, 2) == 3 and rows_per_sample(6, 1) == 6
    assert rows_per_sample(5, 2) is None and rows_per_sample(1, 2) is None


@pytest.mark.slow
def test_unet_3d_tables_every_projection_of_its_embedding() -> None:
    from diffusers import UNet3DConditionModel

    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ).eval()
    inputs = {
        "sample": torch.randn(2, 4, 3, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 7, 8),
    }
    folded = tfmq_fx.fold_timesteps(unet, STEPS, inputs)
    assert len(folded.record["block"]["features"]) == 8 and not folded.record["block"]["declined"]
    one = {name: value[:1] for name, value in inputs.items()}
    with torch.no_grad():
        assert torch.equal(folded(**one).sample, unet(**one).sample)
