"""What quantizers of diffusion models get wrong without anybody noticing: a test for each trap."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.passes.test_quantize_layers import relative_error
from tests.toys import ToyUNet, seeded, tiny_unet2d
from tfmq_fx.api import prepare, save
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.calibration.observers import SampleCache
from tfmq_fx.conversion.convert import convert
from tfmq_fx.core.config import ReconstructionSpec, TemporalSpec
from tfmq_fx.core.layer_config import WeightSpec
from tfmq_fx.core.presets import PRESETS
from tfmq_fx.diagnostics.report import report
from tfmq_fx.prologue.load_model import load
from tfmq_fx.quant.quant_layer import QuantLayer

STEPS = 4


def recipe(name, *, mode="table", **reconstruction):
    """A preset with exact temporal tables, unless told otherwise, and few steps of learning."""
    spec = ReconstructionSpec(**{"iters": 0} | reconstruction)
    return dataclasses.replace(
        PRESETS[name], temporal=TemporalSpec(mode=mode, tiar_iters=20), reconstruction=spec
    )


def batches(count=6, size=8, channels=3):
    generator = torch.Generator().manual_seed(0)
    for t in range(STEPS):
        x = torch.randn(count, channels, size, size, generator=generator) * (0.3 + t)
        yield x, torch.full((count,), t)


def calibrated(model, config, **shape):
    prepared = prepare(model, next(batches(**shape)), timesteps=STEPS, config=config)
    for batch in batches(**shape):
        prepared(*batch)
    return prepared


def converted(model, config, **shape):
    return convert(calibrated(model, config, **shape), progress=False)


@pytest.fixture(scope="module")
def toy():
    return seeded(ToyUNet).eval()


@pytest.fixture(scope="module")
def toy_w4a8(toy):
    return converted(toy, recipe("w4a8"))


@pytest.fixture(scope="module")
def diffusers_unet():
    return converted(tiny_unet2d(), recipe("w4a8"), size=16)


def quantized(model):
    return {n: m for n, m in model.gm.named_modules() if isinstance(m, QuantLayer)}


def test_attention_projections_are_quantized(diffusers_unet):
    layers = quantized(diffusers_unet)
    found = [n for n in layers if ".attentions." in n]
    assert len(found) == 4 * 4  # four attention blocks of to_q, to_k, to_v and to_out
    assert {layers[n].weight_bits for n in found} == {4}
    assert {layers[n].act_bits for n in found} == {8}


def test_shortcuts_downsamplers_and_the_ends_are_quantized(diffusers_unet):
    layers = quantized(diffusers_unet)
    shortcuts = [n for n in layers if n.endswith("conv_shortcut")]
    samplers = [n for n in layers if "samplers" in n]
    assert len(shortcuts) == 5 and len(samplers) == 2
    assert {layers[n].weight_bits for n in (*shortcuts, *samplers)} == {4}
    assert layers["conv_in"].weight_bits == layers["conv_out"].weight_bits == 8
    assert layers["conv_in"].act_bits == 16 and layers["conv_out"].act_bits == 8
    assert report(diffusers_unet).weight_coverage == 1.0
    assert report(diffusers_unet).activation_coverage == 1.0


class Waves(nn.Module):
    """A one-dimensional denoiser."""

    def __init__(self):
        super().__init__()
        self.enter, self.time = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(1, 8)
        self.mix, self.leave = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.Conv1d(8, 3, 1)

    def forward(self, x, t):
        h = torch.tanh(self.enter(x.flatten(2)) + self.time(t[:, None].float())[:, :, None])
        return self.leave(torch.tanh(self.mix(h))).view_as(x)


def test_one_dimensional_convolutions_are_quantized():
    model = seeded(Waves).eval()
    done = converted(model, recipe("w4a8"))
    layers = quantized(done)
    assert set(layers) == {"enter", "mix", "leave"}  # time became a table
    assert layers["mix"].weight_bits == 4 and report(done).weight_coverage == 1.0
    assert relative_error(done, model, batches()) < 1.2e-3  # 32 dB measured, less 3


def test_blocks_are_reconstructed_in_execution_order(toy):
    done = converted(toy, recipe("w4a8", iters=1))
    (learnt,) = [p for p in done.record["passes"] if p["name"] == "reconstruct_blocks"]
    order = list(learnt["details"]["error"])
    path = [
        "conv_in",
        "down1",
        "shrink1",
        "down2",
        "mid1",
        "attention",
        "mid2",
        "up2",
        "smooth",
        "up1",
        "conv_out",
    ]
    assert order == path


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.9)
        self.leave = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        h = nn.functional.dropout(torch.tanh(self.enter(x)), 0.9, self.training)
        return self.leave(self.drop(h)) + t[:, None, None, None]


def test_dropout_is_inert_even_where_the_users_model_is_in_training_mode():
    config = recipe("w4a8", iters=5)
    model = seeded(Dropping)
    evaluated = converted(model.eval(), config)
    trained = converted(model.train(), config)
    assert model.training and model.drop.training
    state = evaluated.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in trained.state_dict().items())
    x, t = next(batches())
    with torch.no_grad():
        assert torch.equal(trained(x, t), trained(x, t))
        assert torch.equal(trained(x, t), evaluated(x, t))


@pytest.mark.parametrize("iters", [0, 2])
@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
def test_an_all_zero_and_a_constant_output_channel_survive(name, iters):
    model = seeded(ToyUNet).eval()
    with torch.no_grad():
        model.down1.conv1.weight[0] = 0  # a dead channel
        model.down1.conv1.weight[1] = 0.25  # a constant one
        model.mid1.conv2.weight.zero_()  # a whole dead layer
        model.mid1.conv2.bias.zero_()
    done = converted(model, recipe(name, iters=iters))
    assert all(bool(torch.isfinite(v).all()) for v in done.state_dict().values())
    # 36.1 and 25.8 dB measured, less 3; a scale of one layer half too large costs more
    assert relative_error(done, model, batches()) < (5e-4 if name == "w8a8" else 5.3e-3)


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_models_of_integer_weights_alone_are_saved_and_loaded(toy, name, tmp_path):
    done = converted(toy, recipe(name))
    save(done, tmp_path / "model")
    again = load(tmp_path / "model")
    x, t = next(batches())
    with torch.no_grad():
        assert torch.equal(again(x, t), done(x, t))
    bits = PRESETS[name].layers.weights.bits
    assert {n: m.weight_bits for n, m in quantized(again).items()} == {
        n: 8 if n in ("conv_in", "conv_out") else bits for n in quantized(done)
    }
    assert all(m.act_bits is None for m in quantized(again).values())


def test_ranges_go_by_the_value_of_t_not_by_the_order_of_calls(toy, toy_w4a8):
    x = torch.cat([x[:1] for x, _ in batches()])
    t = torch.arange(STEPS)
    with torch.no_grad():
        one_by_one = [toy_w4a8(x[i : i + 1], t[i : i + 1]) for i in range(STEPS)]
        for i in (2, 0, 3, 3, 1, 0):  # shuffled and repeated
            assert torch.equal(toy_w4a8(x[i : i + 1], t[i : i + 1]), one_by_one[i])
        mixed = torch.tensor([3, 1, 1, 0, 2])  # several timesteps in one batch
        together = toy_w4a8(x[mixed], t[mixed])
    assert not torch.equal(together[0], together[3])
    expected = torch.cat([one_by_one[i] for i in mixed.tolist()])
    # Convolutions may add in another order in a batch, and a value within 1e-6 of a tie may then
    # round the other way: single steps of 1/255 of a layer's range.
    assert float((together - expected).norm() / expected.norm()) < 0.02
    # a wrong row is far from that: scales differ by up to the ratio of the timesteps' ranges, 11
    with torch.no_grad():
        wrong = toy_w4a8(x[mixed], t[mixed.flip(0)])
    assert float((wrong - expected).norm() / expected.norm()) > 0.1


def test_calibration_in_any_order_gives_the_same_ranges(toy):
    config = recipe("w8a8", rounding="nearest")
    prepared = prepare(toy, next(batches()), timesteps=STEPS, config=config)
    for x, t in reversed(list(batches())):
        for part in (slice(3, None), slice(0, 3)):
            prepared(x[part], t[part])
    shuffled = convert(prepared, progress=False)
    straight = converted(toy, config)
    a, b = shuffled.state_dict(), straight.state_dict()
    # Batches of 3 and of 6 may add in another order: some 30 layers of a few float32 roundings.
    # Zero points are integers picked from those ranges, equal unless two are within that of a tie.
    scales = [k for k in a if "activation_scales" in k]
    assert scales
    for key in scales:
        torch.testing.assert_close(a[key], b[key], rtol=0.02, atol=0)
    codes = [k for k in a if k.endswith("codes")]
    assert codes and all(torch.equal(a[k], b[k]) for k in codes)


@pytest.mark.parametrize(("name", "bits"), [("w8a8", 8), ("w4a8", 4)])
def test_integers_are_what_is_stored(toy, name, bits, tmp_path):
    done = converted(toy, recipe(name))
    layers = quantized(done)
    for path, layer in layers.items():
        count, own = toy.get_submodule(path).weight.numel(), layer.weight_bits
        assert layer.codes.dtype == torch.uint8 and layer.codes.nbytes == -(-count * own // 8)
    inner = [m for n, m in layers.items() if n not in ("conv_in", "conv_out")]
    assert {m.weight_bits for m in inner} == {bits}
    # no float weight is left beside them: norms have vectors only
    assert all(p.dim() == 1 for p in done.parameters())
    convolutions = sum(m.weight.nbytes for m in toy.modules() if isinstance(m, nn.Conv2d))
    codes = sum(m.codes.nbytes for m in layers.values())
    ends = sum(layers[n].codes.nbytes for n in ("conv_in", "conv_out"))
    # 32 bits become `bits`, but 8 in the first and last layer
    assert codes == (convolutions // 4 - ends) * bits // 8 + ends
    save(done, tmp_path / "model")
    stored = sum(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors"))
    assert stored < done.nbytes() + 64_000  # names and alignment of some 150 tensors


def test_samples_for_reconstruction_stay_within_their_capacity(toy):
    row = 3 * 8 * 8 * 4 + 8
    prepared = calibrated(toy, recipe("w4a8", cache=10 * row), count=50)
    assert isinstance(prepared.cache, SampleCache) and 0 < len(prepared.cache) <= 10
    chunks = prepared.cache.chunks(999, batched=[True, True], batch_size=64, seed=0)
    assert sum(v.nbytes for chunk in chunks for v in chunk) <= 10 * row


def test_the_result_does_not_depend_on_the_memory_and_all_samples_are_walked(toy, monkeypatch):
    counts = []

    class Counting(LayerwiseExecutor):
        def __init__(self, gm, chunks, **kwargs):
            counts.append(sum(len(chunk[0]) for chunk in chunks))
            super().__init__(gm, chunks, **kwargs)

    for module in ("round_weights", "reconstruct_blocks"):
        monkeypatch.setattr(f"tfmq_fx.passes.{module}.LayerwiseExecutor", Counting)
    row = 3 * 8 * 8 * 4 + 8
    spilled, held = (
        converted(toy, recipe("w4a8", iters=1, samples=12, memory=memory), count=50)
        for memory in (250 * row, 1 << 30)  # room for all samples, not for what becomes of them
    )
    assert set(counts) == {12}
    for (name, a), b in zip(spilled.state_dict().items(), held.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_chosen_for_weights_is_kept_through_the_whole_pipeline(toy):
    # Rounding must not fall back to another bit width or to float on its way.
    config = dataclasses.replace(recipe("w4a16"), first=None, last=None, name="three")
    layers = dataclasses.replace(config.layers, weights=WeightSpec(bits=3))
    done = converted(toy, dataclasses.replace(config, layers=layers))
    assert {m.weight_bits for m in quantized(done).values()} == {3}
    for layer in quantized(done).values():
        assert len(layer.weight_codes().unique()) <= 2 * 7 + 1  # 3-bit codes less zero points
