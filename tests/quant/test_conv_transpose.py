"""Transposed convolutions as quantized layers: the same operation, output channels first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.presets import resolve
from tfmq_fx.quant.input_statistics import input_rows, row_count
from tfmq_fx.quant.modules import QuantConvTranspose, channels_swapped, kind_of, weight_rows

LAYERS: dict[str, Any] = {
    "2d": lambda: nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
    "1d": lambda: nn.ConvTranspose1d(8, 6, 3, 2, padding=2, output_padding=1, groups=2),
    "3d": lambda: nn.ConvTranspose3d(8, 6, 2, dilation=2),
    "gaps": lambda: nn.ConvTranspose2d(8, 6, 2, stride=3, padding=1, bias=False),
    "kernel": lambda: nn.ConvTranspose2d(8, 6, (2, 3), stride=(1, 2), dilation=(3, 1)),
}


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    return layer, torch.randn(2, 8, *[5] * (layer.weight.dim() - 2))


@pytest.mark.parametrize("name", LAYERS)
def test_the_operation_and_its_input_rows(name: str) -> None:
    layer, x = layer_and_input(name)
    kind = kind_of(layer)
    assert kind is not None and issubclass(kind, QuantConvTranspose)
    quantized = kind.from_float(layer, weight_bits=8, act_bits=None, per_timestep=False)
    weight = weight_rows(layer)
    assert quantized.weight_shape == tuple(weight.shape)
    assert (quantized.in_channels, quantized.out_channels) == (8, 6)
    assert torch.equal(channels_swapped(weight, layer.groups), layer.weight)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(quantized.apply_op(x, weight, quantized.bias), expected)
        rows = input_rows(quantized, x)
        assert rows.shape[1] == row_count(quantized, x)
        y = rows @ weight.reshape(layer.groups, 6 // layer.groups, -1).mT  # (groups, n, channels)
        y = y.transpose(0, 1).reshape(2, *expected.shape[2:], 6).movedim(-1, 1)
        if layer.bias is not None:
            y = y + layer.bias.view(quantized.bias_shape)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        picks = torch.tensor([3, 0, 7])
        assert torch.equal(input_rows(quantized, x, picks), rows[:, picks])


@pytest.mark.parametrize("name", LAYERS)
def test_each_output_channel_has_a_scale(name: str) -> None:
    layer, x = layer_and_input(name)
    with torch.no_grad():
        by_channel = torch.tensor([1.0, 10, 100, 1000, 1e4, 1e5])
        if layer.groups == 1:
            layer.weight *= by_channel.view(1, 6, *[1] * (layer.weight.dim() - 2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = layer

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.up(x)

    model = Model().eval()
    example = {"x": x, "timestep": torch.tensor([1, 1])}
    config = tfmq_fx.Config(name="weights", layers=LayerConfig(activations=None))
    prepared = tfmq_fx.prepare(model, example, config=config, timesteps=[1])
    done = tfmq_fx.convert(prepared, progress=False)
    with torch.no_grad():
        expected, found = model(**example), done(**example)
    error = (found - expected).transpose(0, 1).flatten(1).norm(dim=1)
    assert (error < 0.02 * expected.transpose(0, 1).flatten(1).norm(dim=1)).all()


class Upsampled(nn.Module):
    """A small denoiser around one transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(4, 8, 3, padding=1), LAYERS["2d"]()
        self.last, self.time = nn.Conv2d(6, 4, 3, 2, padding=1), nn.Linear(1, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(x) + self.time(timestep[:, None].float() / 10)[:, :, None, None]
        return self.last(F.silu(self.up(F.silu(h))))


def call(t: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 4, 6, 6), "timestep": torch.full((2,), t)}


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "fp8", "w8a8-dynamic"])
def test_a_model_is_quantized_whole_and_saved(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Upsampled().eval()
    prepared = tfmq_fx.prepare(model, call(), config=recipe, timesteps=[1, 5])
    tfmq_fx.calibrate(prepared, [call(t) for t in (1, 5) * 4], progress=False)
    done = tfmq_fx.convert(prepared, progress=False)
    facts = tfmq_fx.report(done)
    assert facts.weight_coverage == 1.0 and not facts.data["declined"]
    assert done.gm.up.codes.numel() * 8 == 8 * 6 * 16 * done.gm.up.weight_bits  # packed
    given = call(1)
    with torch.no_grad():
        expected, found = model(**given), done(**given)
        sqnr = 20 * torch.log10(expected.norm() / (found - expected).norm())
        assert sqnr > (18 if recipe == "w4a8" else 24)
        tfmq_fx.save(done, tmp_path / "saved")
        loaded = tfmq_fx.load(tmp_path / "saved")
        assert type(loaded.gm.up) is type(done.gm.up) and torch.equal(loaded(**given), found)
    if recipe == "w4a8":
        passes = {each["name"]: each for each in done.record["passes"]}
        errors = passes["round_weights"]["details"]["error"]
        assert errors["up"]["second-order"] < errors["up"]["nearest"]


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "openvino"])
def test_backends_run_it_in_floating_point_and_say_so(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = Upsampled().eval()
    prepared = tfmq_fx.prepare(model, call(), config="w8a8", timesteps=[1, 5])
    tfmq_fx.calibrate(prepared, [call(t) for t in (1, 5)], progress=False)
    done = tfmq_fx.convert(prepared, progress=False)
    compiled = tfmq_fx.compile(done, backend)
    reasons = dict(map(tuple, compiled.declined))
    assert reasons["up"] == "runs in floating point: no int8 kernel for transposed convolutions"
    given = call(5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given), done(**given), rtol=0, atol=0.05)


@pytest.mark.parametrize("recipe", ["brecq-w4a8", "tcaq-w8a8", "best-w4a8"])
def test_blocks_are_reconstructed_and_channels_scaled_around_it(recipe: str) -> None:
    torch.manual_seed(0)
    model, base = Upsampled().eval(), resolve(recipe)
    learning = replace(base.reconstruction, iters=min(base.reconstruction.iters, 20), rounds=0)
    quick = replace(base, reconstruction=learning)
    prepared = tfmq_fx.prepare(model, call(), config=quick, timesteps=[1, 5])
    tfmq_fx.calibrate(prepared, [call(t) for t in (1, 5) * 2], progress=False)
    done = tfmq_fx.convert(prepared, progress=False)
    assert tfmq_fx.report(done).weight_coverage == 1.0
    given = call(5)
    with torch.no_grad():
        expected, found = model(**given), done(**given)
    assert (found - expected).norm() < 0.2 * expected.norm()
