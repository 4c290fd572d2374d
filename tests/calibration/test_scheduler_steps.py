"""Any scheduler drives calibration, in the model's dtype, or is refused before the first call."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.schedulers import NAMES, make
from tests.toys import seeded
from tfmq_fx import ConfigError, calibrate, prepare
from tfmq_fx.calibration.scheduler_sampling import initial_noise, sample
from tfmq_fx.calibration.scheduler_steps import denoised, rehearse

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `.*Scheduler` is deprecated:FutureWarning"),
]
SHAPE = (3, 4, 4)
# whose step() needs more, whose samples are tokens, or whose set_timesteps() needs more
REFUSED = {
    "AmusedScheduler": "cannot drive 5 steps",
    "BlockRefinementScheduler": "cannot drive 5 steps",
    "CogVideoXDPMScheduler": r"step\(\) needs old_pred_original_sample, timestep_back as well",
    "DDPMWuerstchenScheduler": "cannot drive 5 steps",
    "DiscreteDDIMScheduler": "cannot drive 5 steps",
    "EntropyBoundScheduler": "cannot drive 5 steps",
    "HeliosDMDScheduler": "cannot drive 5 steps: KeyError",
    "HeliosScheduler": "cannot drive 5 steps: KeyError",
    "KarrasVeScheduler": r"step\(\) needs sigma_hat, sigma_prev, sample_hat as well",
    "PiflowScheduler": "not divisible by n_grid",
    "RePaintScheduler": r"step\(\) needs original_image, mask as well",
    "SCMScheduler": "Intermediate timesteps for SCM",
    "ScoreSdeVeScheduler": "has no attribute 'step'",
    "VQDiffusionScheduler": "cannot drive 5 steps",
}


class Net(nn.Module):
    """A convolution and a timestep; keeps the dtypes of what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.time = nn.Conv2d(3, 3, 1), nn.Linear(1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.time(t[:, None].to(x.dtype) / 1000)
        out: Tensor = self.enter(x) + shift[:, :, None, None]
        return out


def prepared(kind: torch.dtype = torch.int64, dtype: torch.dtype = torch.float32) -> Any:
    net = seeded(Net).eval().to(dtype)
    return prepare(net, (torch.randn(2, *SHAPE, dtype=dtype), torch.tensor([9, 9]).to(kind)))


shared = functools.cache(prepared)


def calibrated(scheduler: Any, model: Any, **options: Any) -> Any:
    settings = {"num_inference_steps": 5, "samples": 3, "batch_size": 2, **options}
    return calibrate(model, (scheduler, SHAPE), progress=False, **settings)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_every_scheduler_drives(name: str) -> None:
    steps = torch.as_tensor(make(name, 5).timesteps)
    expected = Counter({step: 3 * n for step, n in Counter(steps.tolist()).items()})  # samples
    for dtype in (torch.float32, torch.bfloat16):
        scheduler, model = make(name), shared(steps.dtype, dtype)
        before, state = Counter(model.cache.visits), str(vars(scheduler))
        calibrated(scheduler, model)
        assert Counter(model.cache.visits) - before == expected
        assert str(vars(scheduler)) == state  # it drove by copies
        seen = [ends for observer in model.observers() for ends in observer.seen.values()]
        assert seen and torch.isfinite(torch.tensor(seen)).all()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_drive_is_refused_before_the_first_call(name: str) -> None:
    model = shared(torch.int64, torch.float32)
    before = dict(model.cache.visits)
    with pytest.raises(ConfigError, match=REFUSED[name]) as caught:
        calibrated(make(name), model)
    assert "A scheduler can drive whose" in str(caught.value) and model.cache.visits == before


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler"]
)
def test_noise_of_steps_is_seeded_and_no_batch_repeats_anothers(name: str) -> None:
    def drawn(seed: int) -> Tensor:
        return sample(
            lambda x, t: x / 2, make(name), (4, 1, 2, 2), num_inference_steps=4, seed=seed,
            batch_size=2,
        )  # fmt: skip

    state = torch.get_rng_state()
    first = drawn(0)
    assert torch.equal(first, drawn(0)) and not torch.equal(first, drawn(1))
    assert torch.equal(torch.get_rng_state(), state)
    # from the same noise in both batches the images differ by what the steps added
    scheduler = make(name, 4)
    noise = initial_noise((1, 1, 2, 2), seed=0)
    draws = [
        denoised(lambda x, t: x / 2, scheduler_, noise, generator=torch.Generator().manual_seed(s))
        for s, scheduler_ in ((0, make(name, 4)), (1, scheduler))
    ]
    assert torch.equal(*draws) == (name == "TCDScheduler")  # to which eta 0 leaves no noise


@pytest.mark.parametrize("name", ["PNDMScheduler", "DPMSolverMultistepScheduler", "LMSDiscrete"])
def test_what_a_scheduler_remembers_of_one_batch_does_not_reach_the_next(name: str) -> None:
    name = name if name.endswith("Scheduler") else f"{name}Scheduler"

    def drawn(batch_size: int) -> Tensor:
        return sample(
            lambda x, t: x.sin(), make(name), (4, 1, 2, 2), num_inference_steps=6,
            batch_size=batch_size,
        )  # fmt: skip

    assert torch.equal(drawn(4), drawn(1))  # elementwise arithmetic: exact


def test_a_model_gets_its_dtype_and_timesteps_as_the_scheduler_has_them() -> None:
    kinds = set()
    for name, t in (("EulerDiscreteScheduler", torch.float32), ("DDIMScheduler", torch.int64)):
        for dtype in (torch.float16, torch.float32):

            def denoiser(x: Tensor, t: Tensor) -> Tensor:
                kinds.add((x.dtype, t.dtype))
                return x

            sample(denoiser, make(name), (2, 3), num_inference_steps=3, dtype=dtype)
            assert kinds == {(dtype, t)}
            kinds.clear()


def test_whole_floats_reach_a_graph_of_whole_timesteps_and_others_another_graph() -> None:
    four = make("EulerDiscreteScheduler", 4)
    assert four.timesteps.tolist() == [999.0, 666.0, 333.0, 0.0]
    whole = prepared()
    calibrated(make("EulerDiscreteScheduler"), whole, num_inference_steps=4)
    assert sorted(whole.cache.visits) == [0, 333, 666, 999]
    assert whole.call.inputs[1].dtype == torch.int64
    other = calibrated(make("EulerDiscreteScheduler"), prepared(), num_inference_steps=5)
    assert other.call.inputs[1].dtype == torch.float32  # captured again by its first call
    assert sorted(other.cache.visits) == [0.0, 249.75, 499.5, 749.25, 999.0]


def test_the_rehearsal_tells_the_timesteps_and_leaves_the_scheduler_alone() -> None:
    scheduler = diffusers.HeunDiscreteScheduler()
    state = str(vars(scheduler))
    steps = rehearse(scheduler, SHAPE, 3)
    assert [float(t) for t in steps] == [999.0, 499.5, 499.5, 0.0, 0.0]
    assert str(vars(scheduler)) == state
    shifting = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match=r"cannot drive 3 steps: ValueError: .*mu.*with the pipe"):
        rehearse(shifting, SHAPE, 3)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_settings_of_a_scheduler_decide_the_steps(name: str, config: dict[str, Any]) -> None:
    steps = make(name, 5, **config).timesteps
    model = shared(steps.dtype, torch.float32)
    before = Counter(model.cache.visits)
    calibrated(make(name, **config), model)
    assert set(Counter(model.cache.visits) - before) == set(steps.tolist())


@pytest.mark.parametrize("name", ["DDPMScheduler", "UnCLIPScheduler"])
def test_models_may_answer_with_a_variance_as_well(name: str) -> None:
    scheduler = make(name, variance_type="learned_range")
    assert len(rehearse(scheduler, SHAPE, 5)) == 5
    image = sample(
        lambda x, t: torch.cat([x, x], 1) / 4, scheduler, (2, *SHAPE), num_inference_steps=5
    )
    assert image.shape == (2, *SHAPE) and torch.isfinite(image).all()


def test_a_scheduler_of_ones_own_drives() -> None:
    class Halving:
        def set_timesteps(self, count: int) -> None:
            self.timesteps = range(count - 1, -1, -1)

        def step(self, output: Tensor, t: int, x: Tensor, *, return_dict: bool) -> tuple[Tensor]:
            return (x - output / 2,)

    model = prepared()
    assert sorted(calibrated(Halving(), model).cache.visits) == [0, 1, 2, 3, 4]
