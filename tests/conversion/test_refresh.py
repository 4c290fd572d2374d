"""refresh: the conversion again, of other weights or for other timesteps, to the same bits."""

import copy
import dataclasses
import gc
import importlib.util
import weakref

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from torch import nn

from tests.adapters import CHANGES, Denoiser, adapt, by_copy, by_data, low_rank
from tests.conversion.test_recipes import short
from tests.toys import ToyDiT, ToyUNet, seeded, sinusoidal
from tfmq_fx import (
    ActivationSpec,
    AttentionSpec,
    CalibrationError,
    ConfigError,
    LayerConfig,
    ReconstructionSpec,
    StaleError,
    TemporalSpec,
    WeightSpec,
    bind_request,
    calibrate,
    compile,
    convert,
    fold_timesteps,
    load,
    prepare,
    refresh,
    report,
    save,
    verify,
)
from tfmq_fx.core.config import Config
from tfmq_fx.core.presets import RECIPES, resolve
from tfmq_fx.quant.quant_layer import QuantLayer

STEPS = 4
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
SAMPLING = (DDIMScheduler(num_train_timesteps=100), (4,))


def weights_only(**temporal):
    """Weights of 4 bits, rounded to nearest: nothing is learnt or measured."""
    return Config(
        name="nearest",
        layers=LayerConfig(weights=WeightSpec(bits=4)),
        temporal=TemporalSpec(**{"mode": "table", "tiar_iters": 0, **temporal}),
        reconstruction=ReconstructionSpec(rounding="nearest"),
    )


def quantized(model, config, sampling=SAMPLING, example=None):
    example = example or (X, torch.tensor([1, 1]))
    prepared = prepare(model, example, config=short(resolve(config)))
    calibrate(prepared, sampling, num_inference_steps=STEPS, samples=8, progress=False)
    return convert(prepared, progress=False)


def tensors(model):
    return {name: value.clone() for name, value in model.gm.state_dict().items()}


def same(a, b):
    """Whether two models hold the same tensors, bit for bit."""
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def exact(model, source, steps, x=X[:1]):
    """Whether outputs are the source's, bit for bit at batch 1."""
    with torch.no_grad():
        return all(torch.equal(model(x, t[None]), source(x, t[None])) for t in torch.tensor(steps))


@pytest.fixture
def source():
    return seeded(Denoiser).eval()


@pytest.fixture(scope="module")
def learnt():
    """A source, not to be changed, and what w4a8 makes of it."""
    source = seeded(Denoiser).eval()
    return source, quantized(source, "w4a8")


# ---------------------------------------------------------------- the same weights


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_gives_the_same_bits_again(source, recipe):
    model = quantized(source, recipe)
    before = tensors(model)
    again = refresh(model, source, progress=False)
    assert same(again, model) and again.gm.code == model.gm.code
    steps = model.timesteps.tolist()
    assert all(torch.equal(again(X, t), model(X, t)) for t in steps)
    twice = refresh(again, source, progress=False)  # what was made remembers as well
    assert same(twice, model) and twice.origin.graph == model.origin.graph
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())


def test_attention_and_corrections_come_again():
    source = seeded(ToyDiT, depth=1).eval()
    example = (torch.randn(2, 3, 8, 8), torch.tensor([1, 1]), torch.tensor([3, 4]))
    generator = torch.Generator().manual_seed(0)
    recipe = dataclasses.replace(
        short(resolve("w4a8")),
        layers=LayerConfig(weights=WeightSpec(bits=2), activations=ActivationSpec()),
        attention=AttentionSpec(probabilities="log2"),
        correction="bias",
    )
    prepared = prepare(source, example, config=recipe, timesteps=[1, 9])
    data = [
        (torch.randn(40, 3, 8, 8, generator=generator), torch.full((40,), t), torch.arange(40) % 10)
        for t in (1, 9)
    ]
    model = convert(calibrate(prepared, data, progress=False), progress=False)
    names = {p["name"] for p in model.record["passes"] if p["changed"]}
    assert {"quantize_products", "correct_outputs"} <= names
    assert same(refresh(model, source, progress=False), model)
    made = refresh(model, source, timesteps=5)
    assert same(refresh(made, source, timesteps=[1, 9]), model)


def resampling():
    """A recipe with a round of resampling with the quantized model."""
    spec = dataclasses.replace(
        resolve("w4a8").reconstruction, iters=2, rounds=1, round_iters=2, batch_size=8
    )
    return dataclasses.replace(resolve("w4a8"), reconstruction=spec)


def test_a_round_of_resampling_uses_the_new_source(source):
    model = quantized(source, resampling())
    assert model.origin.calibration.sampling is not None
    assert same(refresh(model, source, progress=False), model)
    by_data(source, "enter.weight")
    again = refresh(model, source, progress=False)
    assert not same(again, model)
    assert same(refresh(again, source, progress=False), again)


def test_no_pipeline_keeps_a_source_alive():
    class Pipeline:
        """As much of one as calibration asks for."""

        def __init__(self, unet, scheduler):
            self.components = {"unet": unet, "scheduler": scheduler}
            self.config = {}

        def set_progress_bar_config(self, **options):
            pass

        def __call__(self, batch_size, num_inference_steps, generator):
            for t in range(num_inference_steps):
                self.components["unet"](torch.randn(batch_size, 4, generator=generator), t)

    source = seeded(Denoiser).eval()
    model = quantized(source, resampling(), Pipeline(source, DDIMScheduler()))
    other = copy.deepcopy(source)
    gone = weakref.ref(source.enter)
    del source
    gc.collect()
    assert gone() is None
    assert same(refresh(model, other, progress=False), model)


# ---------------------------------------------------------------- other weights


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_taken(source, change):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    before = tensors(model)
    change(source, "time.0.weight")
    with pytest.raises(StaleError):
        model.watch.check_contents()
    made = refresh(model, source)
    assert exact(made, source, range(5)) and not same(made, model)
    assert same(made, fold_timesteps(source, 5, (X, torch.tensor([1, 1]))))
    with pytest.raises(StaleError):  # the old one is what it was
        model.watch.check_contents()
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())


def test_changed_weights_that_are_shared_are_taken(source):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    by_data(source, "enter.weight")  # half a model would be changed by now
    made = refresh(model, source)
    assert exact(made, source, range(5)) and made.gm.enter.weight.data_ptr() in {
        p.data_ptr() for p in source.parameters()
    }


@pytest.mark.parametrize("mode", ["table", "cache", "tib", "select"])
def test_where_nothing_is_measured_it_equals_converting_anew(source, mode):
    recipe = weights_only(mode=mode)

    def made():
        prepared = prepare(source, (X, torch.tensor([1, 1])), timesteps=6, config=recipe)
        return convert(prepared, progress=False)

    model = made()
    for name in ("enter.weight", "time.2.weight"):
        by_data(source, name)
    again = refresh(model, source, progress=False)
    assert same(again, made()) and not same(again, model)
    assert any(isinstance(m, QuantLayer) for m in again.gm.modules())


def test_a_fused_adapter_is_taken_and_an_unfused_one_refused(source):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    adapters = adapt(source, "enter", "time.2")
    with pytest.raises(ConfigError, match="enter has an adapter that is not fused"):
        refresh(model, source)
    for adapter in adapters:
        adapter.merge()
    made = refresh(model, source)
    assert exact(made, source, range(5))
    plain = seeded(Denoiser).eval()
    for adapter, layer in zip(adapters, (plain.enter, plain.time[2]), strict=True):
        layer.weight.data += adapter.delta()
    assert same(made, fold_timesteps(plain, 5, (X, torch.tensor([1, 1]))))


def test_layers_that_were_equal_and_are_no_more_come_apart(source):
    class Twice(Denoiser):
        """Two layers of the timestep that are born equal, as those that start at zero are."""

        def __init__(self):
            super().__init__()
            self.shift = nn.Linear(16, 16)
            self.scale = copy.deepcopy(self.shift)

        def forward(self, x, t):
            emb = torch.tanh(self.time(sinusoidal(t, 8)))
            h = self.enter(x)
            return self.leave(torch.tanh(h * (1 + self.scale(h)) + self.shift(h) + emb))

    source = seeded(Twice).eval()
    model = quantized(source, "w8a8")
    assert model.origin.merged == {"scale": "shift"} or model.origin.merged == {"shift": "scale"}
    by_data(source, "shift.weight")
    assert exact(refresh(fold_timesteps(source, 3, (X, torch.tensor([1, 1]))), source), source, [2])
    made = refresh(model, source, progress=False)
    assert made.origin.merged == {} and {"scale", "shift"} <= set(made.record["sites"])
    zeros = made.gm.get_submodule("scale").act_zero, made.gm.get_submodule("shift").act_zero
    assert torch.equal(*zeros)  # both read what the one of before read
    assert torch.isfinite(made(X, 50)).all()


def test_two_sources_make_two_models(source):
    other = seeded(Denoiser, seed=1).eval()
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    made = refresh(model, other)
    assert exact(model, source, range(5)) and exact(made, other, range(5))
    by_copy(source, "enter.weight")
    made(X, 1)
    with pytest.raises(StaleError):
        model(X, 1)
    by_copy(other, "enter.weight")
    with pytest.raises(StaleError):
        made(X, 1)


def test_new_timesteps_by_an_equal_source_leave_the_first_one(source):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    other = copy.deepcopy(source)
    made = refresh(model, other, timesteps=7)
    by_data(source, "enter.weight")  # whose memory the first model shares
    assert exact(made, other, range(7))
    by_copy(other, "enter.weight")
    with pytest.raises(StaleError):
        made(X, 1)


def test_a_model_that_was_moved_comes_back_where_it_was(source):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1]))).half()
    made = refresh(model, source)
    assert made.dtype == torch.float16 and same(made, model)
    assert torch.equal(made(X.half(), 3), model(X.half(), 3))
    assert source.enter.weight.dtype == torch.float32
    timed = refresh(model, source, timesteps=7)
    assert timed(X.half(), 6).dtype == torch.float16
    direct = fold_timesteps(source, 7, (X, torch.tensor([1, 1]))).half()
    assert same(timed, direct)


def test_what_was_made_is_verified_against_its_source():
    source = seeded(Denoiser).eval()
    model = fold_timesteps(source, 3, (X[:1], torch.tensor([1])))
    for name in ("enter.weight", "time.0.weight"):
        by_data(source, name)
    assert verify(source, refresh(model, source)).ok
    model.watch = None  # as a model would be that nobody watches: wrong, and seen to be
    assert not verify(source, model).ok


# ---------------------------------------------------------------- other models


def test_other_models_are_named(source):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    with pytest.raises(ConfigError, match=r"this ToyUNet .*: it has no enter\.weight"):
        refresh(model, seeded(ToyUNet))
    with pytest.raises(ConfigError, match=r"enter\.weight is float32 \(8, 4\), where .*\(16, 4\)"):
        refresh(model, seeded(Denoiser, width=8))
    with pytest.raises(ConfigError, match=r"is float16 .*, where it was float32"):
        refresh(model, copy.deepcopy(source).half())
    with pytest.raises(ConfigError, match="on the meta device"):
        refresh(model, copy.deepcopy(source).to("meta"))
    deeper = copy.deepcopy(source)
    deeper.more = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"another model: it has more\.weight, more\.bias besid"):
        refresh(model, deeper)
    broken = copy.deepcopy(source)
    broken.enter.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"enter\.weight holds NaN or Inf"):
        refresh(model, broken)


def test_arguments_that_make_no_sense_are_refused(source):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    with pytest.raises(ConfigError, match=r"needs the source .*, timesteps that are, or both"):
        refresh(model)
    with pytest.raises(ConfigError, match=r"the source must be a torch\.nn\.Module, got O"):
        refresh(model, source.state_dict())
    with pytest.raises(ConfigError, match="takes the converted model that was compiled"):
        refresh(compile(model, "eager"), source)
    with pytest.raises(ConfigError, match=r"takes what convert.*, not a Denoiser"):
        refresh(source, source)
    with pytest.raises(ConfigError, match=r"cannot hold 0\.5"):
        refresh(model, source, timesteps=[0.5])


# ---------------------------------------------------------------- loaded models


def test_a_loaded_model_is_refreshed_by_its_calibration(learnt, tmp_path):
    source, model = learnt
    save(model, tmp_path / "model", calibration=True)
    loaded = load(tmp_path / "model")
    assert same(refresh(loaded, source, progress=False), model)
    other = copy.deepcopy(source)
    by_data(other, "enter.weight")
    expected = refresh(model, other, progress=False)
    assert same(refresh(loaded, other, progress=False), expected)
    save(expected, tmp_path / "again", calibration=True)
    assert same(refresh(load(tmp_path / "again"), source, progress=False), model)


def test_without_calibration_quantized_weights_are_refused_and_timesteps_are_not(learnt, tmp_path):
    source, model = learnt
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    attached = refresh(loaded, source, progress=False)  # the weights are the same
    assert same(attached, model) and attached.watch.watches(source) and loaded.watch is None
    made = refresh(loaded, source, timesteps=20)
    assert same(made, refresh(model, source, timesteps=20))
    assert made.watch is not None and made.watch.watches(source)
    other = copy.deepcopy(source)
    by_data(other, "time.0.weight")
    for options in ({}, {"timesteps": 20}):
        with pytest.raises(CalibrationError, match=r"saved without.* \(enter, leave\)"):
            refresh(loaded, other, progress=False, **options)


def test_without_calibration_what_measured_nothing_is_refreshed(source, tmp_path):
    prepared = prepare(source, (X, torch.tensor([1, 1])), timesteps=6, config=weights_only())
    models = [fold_timesteps(source, 6, (X, torch.tensor([1, 1]))), convert(prepared)]
    for i, model in enumerate(models):
        save(model, tmp_path / str(i))
    by_data(source, "time.0.weight")
    by_data(source, "enter.weight")
    for i, model in enumerate(models):
        made = refresh(load(tmp_path / str(i)), source, progress=False)
        assert same(made, refresh(model, source, progress=False)) and not same(made, model)


def test_rounds_of_resampling_are_not_saved(source, tmp_path):
    model = quantized(source, resampling())
    save(model, tmp_path / "model", calibration=True)
    with pytest.raises(CalibrationError, match=r"samples again .* which no save holds"):
        refresh(load(tmp_path / "model"), source, progress=False)


# ---------------------------------------------------------------- other timesteps


def test_there_and_back_gives_the_same_rows(learnt):
    source, model = learnt
    there = refresh(model, source, timesteps=50)
    new = 50 - sum(step < 50 for step in model.timesteps.tolist())
    assert len(there.timesteps) == 50 and there.record["interpolated"] == new > 40
    text = f"50 from 0 to 49 ({new} between those of calibration: scales interpolated)"
    assert text in str(report(there))
    between = refresh(there, source, timesteps=[3, 80])
    back = refresh(between, source, timesteps=model.timesteps)
    assert same(back, model) and back.record["interpolated"] == 0
    assert "interpolated)" not in str(report(back))
    # not by way of the other: what calibration measured is what counts
    assert same(between, refresh(model, source, timesteps=[3, 80]))
    for t in (0, 7, 49):
        assert torch.isfinite(there(X, t)).all()
    assert same(refresh(there, source, progress=False), there)  # the set stays


def test_new_weights_and_new_timesteps_at_once(learnt):
    source, model = learnt
    other = copy.deepcopy(source)
    by_data(other, "enter.weight")
    by_data(other, "time.2.weight")
    both = refresh(model, other, timesteps=20, progress=False)
    one_by_one = refresh(refresh(model, other, progress=False), other, timesteps=20)
    assert same(both, one_by_one) and both.watch.watches(other)
    assert both.origin.scales and not refresh(model, other, progress=False).origin.scales


def test_new_timesteps_make_copies_that_live_alone(learnt):
    source, model = learnt
    before = tensors(model)
    made = refresh(model, source, timesteps=10)
    shared = {t.data_ptr() for t in model.tensors()} & {t.data_ptr() for t in made.tensors()}
    assert shared  # weights are not copied
    made.half()
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())
    assert all(before[name].dtype == value.dtype for name, value in tensors(model).items())


def test_changed_timesteps_survive_copying_and_saving(learnt, tmp_path):
    source, model = learnt
    made = refresh(model, source, timesteps=10)
    save(made, tmp_path / "model")
    for other in (copy.deepcopy(made), load(tmp_path / "model")):
        assert same(refresh(other, source, timesteps=model.timesteps), model)


def test_without_a_source_rows_are_selected_or_refused(source):
    model = fold_timesteps(source, 5, (X, torch.tensor([1, 1])))
    few = refresh(model, timesteps=[1, 3])
    assert few.timesteps.tolist() == [1, 3] and exact(few, source, [1, 3])
    with pytest.raises(ConfigError, match=r"1 of 2 timesteps are new to the table of time\.2"):
        refresh(model, timesteps=[1, 9])
    by_data(source, "leave.weight")
    with pytest.raises(StaleError):
        refresh(model, timesteps=[1, 3])


def test_without_features_no_source_is_needed(source):
    recipe = dataclasses.replace(
        short(resolve("w8a8")), temporal=TemporalSpec(mode="tib", tiar_iters=1)
    )
    prepared = prepare(source, (X, torch.tensor([1, 1])), config=recipe)
    calibrate(prepared, SAMPLING, num_inference_steps=STEPS, samples=8, progress=False)
    model = convert(prepared, progress=False)
    made = refresh(model, timesteps=20)
    assert made.timesteps.tolist() == list(range(20)) and torch.isfinite(made(X, 13)).all()
    assert same(refresh(made, timesteps=model.timesteps), model)


SCHEDULERS = [
    DDIMScheduler(),
    EulerDiscreteScheduler(use_karras_sigmas=True),
    FlowMatchEulerDiscreteScheduler(),
    LCMScheduler(),
    HeunDiscreteScheduler(),  # visits most timesteps twice
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_any_schedulers_timesteps_are_a_set(source, scheduler):
    first = torch.linspace(0, 999, 4)
    model = fold_timesteps(source, first, (X, torch.tensor([1.0, 1.0])))
    for count in (20, 8, 20):
        scheduler.set_timesteps(count)
        made = refresh(model, source, timesteps=scheduler)
        steps = scheduler.timesteps.float()
        assert exact(made, source, steps.tolist())
        assert torch.equal(made.timesteps, steps.double().unique())
    direct = fold_timesteps(source, scheduler.timesteps.unique(), (X, torch.tensor([1.0, 1.0])))
    assert same(made, direct)


def test_timesteps_as_shares_of_a_thousand(source):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    model = fold_timesteps(source, torch.tensor([0.25, 0.5]), (X, torch.tensor([0.5, 0.5])))
    received = scheduler.timesteps / 1000
    made = refresh(model, source, timesteps=received)
    assert exact(made, source, received.tolist())


# ---------------------------------------------------------------- bound models


def test_a_bound_model_stays_bound():
    source = seeded(ToyDiT, depth=1).eval()
    x, y = torch.randn(1, 3, 8, 8), torch.tensor([3])
    for model in (
        bind_request(source, example_inputs=(x, torch.tensor([1]), y)),
        bind_request(fold_timesteps(source, 5, (x, torch.tensor([1]), y))),
    ):
        expected = source(x, torch.tensor([2]), y)
        assert torch.equal(model(x, 2, y), expected)
        keep = {name: value.clone() for name, value in source.state_dict().items()}
        by_copy(source, "head.weight")
        by_copy(source, "label.weight")
        with pytest.raises(StaleError, match=r"label\.weight, .*head\.weight"):
            model(x, 2, y)
        made = refresh(model, source)
        assert type(made) is type(model) and made.spec == model.spec
        assert torch.equal(made(x, 2, y), source(x, torch.tensor([2]), y))
        if model.unbound().timesteps is None:
            with pytest.raises(ConfigError, match="has no tables: it takes any timesteps"):
                refresh(model.unbound(), source, timesteps=[2])
        timed = refresh(made, source, timesteps=[2, 8])
        assert torch.equal(timed(x, 8, y), source(x, torch.tensor([8]), y))
        source.load_state_dict(keep)


# ---------------------------------------------------------------- the real thing


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_a_lora_of_peft_is_refused_until_it_is_fused_and_refreshed():
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    source = seeded(
        UNet2DConditionModel,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
    model = fold_timesteps(source, 5)
    inputs = (torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.randn(1, 77, 8))
    layers = ["to_q", "to_k", "time_emb_proj"]
    source.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights="gaussian"))
    for name, value in source.named_parameters():
        if "lora_B" in name:
            value.data = low_rank(value.shape)
    with pytest.raises(StaleError, match="has an adapter that is not fused"):
        model(*inputs)
    with pytest.raises(ConfigError, match="has an adapter that is not fused"):
        refresh(model, source)
    source.fuse_lora()
    with pytest.raises(StaleError, match=r"time_emb_proj\.weight"):
        model(*inputs)
    made = refresh(model, source)
    assert torch.equal(made(*inputs).sample, source(*inputs).sample)
    source.unfuse_lora()
    with pytest.raises(StaleError):
        made(*inputs)
