"""schedulers: what the model's error brings is taken out of the noise that the sampler adds."""

import copy
import inspect
import pickle

import pytest
import torch

from tests.passes.test_correct_outputs import W2, batches
from tests.passes.test_quantize_layers import TIMES, quantize
from tests.test_sites import graph_of
from tests.toys import ToyUNet, seeded, tiny_unet2d
from tfmq_fx import api
from tfmq_fx.capture import capture
from tfmq_fx.config import Config
from tfmq_fx.correction import measure_errors
from tfmq_fx.errors import ConfigError, InputError
from tfmq_fx.modules import Converted
from tfmq_fx.passes.correct_outputs import correct_outputs
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.records import pass_record
from tfmq_fx.schedulers import correct_scheduler

diffusers = pytest.importorskip("diffusers")
from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402

STEPS, T = 10, 400  # the timestep looked at, of 0, 100, ..., 900
VALUES = 200_000
# A variance from n values has a relative standard deviation of sqrt(2 / n); of two such, compared:
# sqrt(4 / n). Five of them.
CLOSE = 5 * (4 / VALUES) ** 0.5
EXAMPLE = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}


def convert(source, example, times, timestep):
    """A model folded by hand."""
    captured = capture(source, example, timestep=timestep)
    gm = fold_timesteps(captured.gm, timesteps=times).gm
    return Converted(
        gm,
        captured.call,
        recipe=Config(),
        record={"passes": []},
        model_config=getattr(source, "config", None),
    )


@pytest.fixture(scope="module")
def folded():
    return convert(seeded(ToyUNet).eval(), EXAMPLE, torch.arange(0, 1000, 100), "t")


def model(folded, variance, **details):
    """A converted model whose record tells this variance at every timestep."""
    made = copy.deepcopy(folded)
    details = {"kind": "noise", "variance": [variance] * len(folded.timesteps)} | details
    made.record["passes"].append({"name": "correct_outputs", "details": details, "declined": []})
    return made


def scheduler(kind, **settings):
    made = kind(clip_sample=settings.pop("clip_sample", False), **settings)
    made.set_timesteps(STEPS)
    return made


def step(made, output, x, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return made.step(output, T, x, generator=generator, **kwargs).prev_sample


def variances(made, **kwargs):
    """Of the noise added, and the slope of the next sample by the output, both measured."""
    x, y = torch.full((1, 1, 1, VALUES), 0.3), torch.full((1, 1, 1, VALUES), 0.1)
    added = float(step(made, y, x, **kwargs).var())
    c = (
        step(made, y.double() + 1e-3, x.double(), **kwargs)
        - step(made, y.double(), x.double(), **kwargs)
    ) / 1e-3
    return x, y, added, float(c.mean())


CASES = [
    (kind, prediction, kwargs)
    for kind, kwargs in (
        (DDPMScheduler, {}),
        (DDIMScheduler, {"eta": 1.0}),
        (DDIMScheduler, {"eta": 0.4}),
    )
    for prediction in ("epsilon", "sample", "v_prediction")
]


@pytest.mark.parametrize(("kind", "prediction", "kwargs"), CASES)
def test_the_next_sample_varies_as_with_the_exact_denoiser(folded, kind, prediction, kwargs):
    plain = scheduler(kind, prediction_type=prediction)
    x, y, added, c = variances(plain, **kwargs)
    brought = 0.5 * added / c**2  # half of what is added comes with the estimate
    corrected = correct_scheduler(plain, model(folded, brought))
    noisy = y + brought**0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert float(step(plain, noisy, x, **kwargs).var()) == pytest.approx(1.5 * added, rel=CLOSE)
    found = step(corrected, noisy, x, **kwargs)
    assert float(found.var()) == pytest.approx(added, rel=CLOSE)
    exact = step(plain, y, x, **kwargs)
    # means of n values: five standard deviations of their difference
    assert abs(float(found.mean() - exact.mean())) < 5 * (2 * added / VALUES) ** 0.5
    # the same random numbers, of which less is added
    assert torch.allclose(
        step(corrected, y, x, **kwargs) - exact.mean(),
        0.5**0.5 * (exact - exact.mean()),
        atol=1e-2 * added**0.5,
    )


@pytest.mark.parametrize(("kind", "prediction", "kwargs"), CASES)
def test_no_noise_is_added_where_the_estimate_brings_more(folded, kind, prediction, kwargs):
    plain = scheduler(kind, prediction_type=prediction)
    x, y, added, c = variances(plain, **kwargs)
    corrected = correct_scheduler(plain, model(folded, 2 * added / c**2))
    assert float(step(corrected, y, x, **kwargs).std()) < 1e-6


@pytest.mark.parametrize(
    ("kind", "settings", "kwargs"),
    [
        (DDPMScheduler, {"variance_type": "fixed_small_log"}, {}),
        (DDPMScheduler, {"variance_type": "fixed_large"}, {}),
        (DDIMScheduler, {"set_alpha_to_one": False}, {"eta": 1.0}),
        (DDPMScheduler, {"beta_schedule": "squaredcos_cap_v2"}, {}),
    ],
)
def test_other_settings(folded, kind, settings, kwargs):
    plain = scheduler(kind, **settings)
    x, y, added, c = variances(plain, **kwargs)
    corrected = correct_scheduler(plain, model(folded, 0.5 * added / c**2))
    assert float(step(corrected, y, x, **kwargs).var()) == pytest.approx(added / 2, rel=CLOSE)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (DDPMScheduler, {}),
        (DDIMScheduler, {"eta": 1.0}),
        (DDIMScheduler, {"eta": 1.0, "use_clipped_model_output": True}),
    ],
)
def test_values_that_are_clipped_bring_no_noise(folded, kind, kwargs):
    """Half of x is so large that the predicted sample is clipped, whatever the estimate's noise."""
    plain = scheduler(kind, clip_sample=True)
    x, y, _, _ = variances(plain, **kwargs)
    x = torch.where(torch.arange(VALUES) % 2 == 0, x, 3.0)
    noise = 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    corrected = correct_scheduler(plain, model(folded, 0.02**2))
    exact, noisy = step(plain, y, x, **kwargs), step(plain, y + noise, x, seed=2, **kwargs)
    found = step(corrected, y + noise, x, seed=2, **kwargs)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        expected = float(exact[..., part].var())
        # half the values; what is taken out is small beside what is added
        assert float(found[..., part].var()) == pytest.approx(expected, rel=1.5 * CLOSE)
    if kind is DDPMScheduler:
        assert torch.equal(found[..., 1::2], noisy[..., 1::2])
        assert not torch.equal(found[..., ::2], noisy[..., ::2])


def test_the_last_step_and_half_precision(folded):
    for kind, kwargs in ((DDPMScheduler, {}), (DDIMScheduler, {"eta": 1.0})):
        plain = scheduler(kind, clip_sample=True)
        corrected = correct_scheduler(plain, model(folded, 0.01))
        x = torch.randn(2, 3, 4, 4).half()
        y = torch.randn(2, 3, 4, 4).half()
        last = corrected.step(y, 0, x, **kwargs)
        assert torch.equal(last.prev_sample, plain.step(y, 0, x, **kwargs).prev_sample)
        found = corrected.step(y, torch.tensor(T), x, **kwargs)
        assert found.prev_sample.dtype == torch.float16
        pair = corrected.step(y, T, x, **kwargs, return_dict=False)
        assert isinstance(pair, tuple) and torch.equal(pair[1], found.pred_original_sample)


def test_given_noise_is_scaled_too(folded):
    plain = scheduler(DDIMScheduler)
    x, y, added, c = variances(plain, eta=1.0)
    corrected = correct_scheduler(plain, model(folded, 0.75 * added / c**2))
    z = torch.randn(y.shape)
    mean = plain.step(y, T, x, eta=1.0, variance_noise=0 * z).prev_sample
    full = plain.step(y, T, x, eta=1.0, variance_noise=z).prev_sample - mean
    less = corrected.step(y, T, x, eta=1.0, variance_noise=z).prev_sample - mean
    # added was measured to CLOSE, half of which is left in the amplitude of a quarter
    assert torch.allclose(less, 0.5 * full, rtol=3 * CLOSE, atol=1e-5)


def test_eta_0_says_that_there_is_nothing_to_subtract(folded):
    plain = scheduler(DDIMScheduler)
    corrected = correct_scheduler(plain, model(folded, 0.01))
    x = torch.randn(1, 3, 4, 4)
    with pytest.warns(UserWarning, match="eta=0 adds no noise"):
        found = corrected.step(x, T, x).prev_sample
    assert torch.equal(found, plain.step(x, T, x).prev_sample)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_it_passes_for_its_original(folded, kind, tmp_path):
    plain = scheduler(kind)
    before = dict(vars(plain))
    corrected = correct_scheduler(plain, model(folded, 0.01))
    assert vars(plain) == before and type(plain) is kind
    assert isinstance(corrected, kind) and corrected.config == plain.config
    assert torch.equal(corrected.timesteps, plain.timesteps)
    signature = inspect.signature(corrected.step).parameters
    assert list(signature) == list(inspect.signature(plain.step).parameters)
    corrected.save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path)) is kind
    assert type(type(corrected).from_config(corrected.config)) is kind
    for again in (copy.deepcopy(corrected), pickle.loads(pickle.dumps(corrected))):
        assert again.leftover == corrected.leftover and again.config == corrected.config
        x, kwargs = torch.randn(1, 3, 4, 4), {"eta": 1.0} if kind is DDIMScheduler else {}
        assert torch.equal(step(again, x, x, **kwargs), step(corrected, x, x, **kwargs))
    twice = correct_scheduler(corrected, model(folded, 0.02))
    assert set(twice.leftover.values()) == {0.02} and twice.plain is kind


def test_a_pipeline_runs_with_it():
    unet = tiny_unet2d()
    times = torch.arange(0, 1000, 250)
    example = {"sample": torch.randn(1, 3, 16, 16), "timestep": 1}
    folded = convert(unet, example, times, "timestep")
    made = model(folded, 1e-3)
    pipe = diffusers.DDIMPipeline(made, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipe(generator=generator, num_inference_steps=4, eta=1.0, output_type="np").images
        )

    plain = images()
    pipe.scheduler = correct_scheduler(pipe.scheduler, made)
    assert (images() - plain).abs().max() > 1e-3


def test_a_variance_measured_end_to_end():
    """Quantized by hand, corrected, measured: the record is what correct_scheduler() reads."""
    reference = graph_of(seeded(ToyUNet).eval(), 3, 8, 8)
    rough = quantize(reference, W2, [], TIMES).gm
    errors = measure_errors(reference, rough, batches(), timesteps=TIMES)
    done = correct_outputs(rough, errors=errors, kind="noise", timesteps=TIMES)
    done.gm.meta["timesteps"] = TIMES
    call = capture(seeded(ToyUNet).eval(), EXAMPLE, timestep="t").call
    record = {"passes": [pass_record(done)]}
    made = Converted(done.gm, call, recipe=Config(layers=W2), record=record)
    found = correct_scheduler(DDPMScheduler(), made).leftover
    assert list(found) == [0.0, 1.0, 2.0, 3.0]
    assert list(found.values()) == done.details["variance"] and min(found.values()) > 0
    compiled = api.compile(made, "eager")
    assert correct_scheduler(DDPMScheduler(), compiled).leftover == found


def test_other_models_and_schedulers_are_refused(folded):
    plain, good = DDPMScheduler(), model(folded, 0.01)
    with pytest.raises(ConfigError, match=r"convert\(\), load\(\) or compile\(\).*not a ToyUNet"):
        correct_scheduler(plain, ToyUNet())
    with pytest.raises(ConfigError, match="made with correction='none'"):
        correct_scheduler(plain, folded)
    with pytest.raises(ConfigError, match="made with correction='bias'"):
        correct_scheduler(plain, model(folded, 0.01, kind="bias"))
    declined = model(folded, 0.01)
    del declined.record["passes"][-1]["details"]["variance"]
    declined.record["passes"][-1]["declined"] = [["out", "dim 0 is not the batch"]]
    with pytest.raises(ConfigError, match="is not known: dim 0 is not the batch"):
        correct_scheduler(plain, declined)
    with pytest.raises(ConfigError, match="not EulerDiscreteScheduler"):
        correct_scheduler(diffusers.EulerDiscreteScheduler(), good)
    with pytest.raises(ConfigError, match="thresholding=True"):
        correct_scheduler(DDPMScheduler(thresholding=True), good)
    with pytest.raises(ConfigError, match="variance_type='learned_range'"):
        correct_scheduler(DDPMScheduler(variance_type="learned_range"), good)
    with pytest.raises(ConfigError, match="prediction_type='flow'"):
        correct_scheduler(DDIMScheduler(prediction_type="flow"), good)
    corrected = correct_scheduler(scheduler(DDPMScheduler), good)
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(InputError, match="timestep 401 is not among the 10"):
        corrected.step(x, 401, x)
