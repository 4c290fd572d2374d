"""Metrics against closed forms, and the sampling loop against a denoiser that knows the answer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation import image_metrics
from tfmq_fx.quant import sqnr

EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, d: int, seed: int) -> torch.Tensor:
    """Rows (n, d) with mean 0 and unbiased covariance I, up to rounding."""
    x = normal(n, d, seed=seed)
    q, _ = torch.linalg.qr(x - x.mean(0))
    return q * math.sqrt(n - 1)


# sqnr


def test_sqnr_of_a_hundredth_of_the_signal_is_40_db():
    signal = normal(1000)
    # Rounding signal * 1.01 moves the error by eps / 0.01 of itself at most: 1e-13 relative.
    assert sqnr.sqnr(signal, signal * 1.01) == pytest.approx(40, abs=1e-10)


def test_sqnr_of_uniform_noise_is_known():
    signal, noise = torch.full((100_000,), 3.0, dtype=torch.float64), torch.rand(100_000) - 0.5
    # Noise power is 1/12; the mean of 1e5 squares has standard error 1/sqrt(180)/316 = 2.4e-4,
    # that is 0.0123 dB, and six of them are 0.08 dB.
    expected = 10 * math.log10(9 * 12)
    assert sqnr.sqnr(signal, signal + noise) == pytest.approx(expected, abs=0.08)


def test_sqnr_without_error_signal_or_sense():
    x, zero = torch.ones(4), torch.zeros(4)
    assert sqnr.sqnr(x, x) == math.inf
    assert sqnr.sqnr(zero, zero) == math.inf
    assert sqnr.sqnr(zero, x) == -math.inf
    assert math.isnan(sqnr.sqnr(x, x * math.nan))
    assert sqnr.sqnr(x, zero) == 0.0


def test_sqnr_does_not_overflow_in_low_precision():
    x = torch.full((1000,), 3e4, dtype=torch.float16)  # the square is beyond fp16
    assert sqnr.sqnr(x, x / 2) == pytest.approx(20 * math.log10(2), abs=1e-12)


def test_sqnr_refuses_unequal_and_empty_shapes():
    with pytest.raises(ConfigError, match=r"shapes differ: \(2,\) and \(3,\)"):
        sqnr.sqnr(torch.ones(2), torch.ones(3))
    with pytest.raises(ConfigError, match="nothing to compare"):
        sqnr.sqnr(torch.ones(0), torch.ones(0))


# output_sqnr


def test_output_sqnr_pools_energies_and_averages_decibels():
    reference = torch.stack([torch.full((2, 5), 1.0), torch.full((2, 5), 10.0)]).double()
    error = torch.tensor([0.1, 0.1], dtype=torch.float64).view(2, 1, 1)
    result = sqnr.output_sqnr(reference, reference + error)
    # 0.1 added to 1 and to 10 rounds by eps/0.1 and 10 eps/0.1: far below 1e-9 dB.
    assert result.per_step == pytest.approx([20, 40], abs=1e-9)
    assert result.mean == pytest.approx(30, abs=1e-9)
    assert result.pooled == pytest.approx(10 * math.log10(101 / 0.02), abs=1e-9)


def test_output_sqnr_agrees_with_sqnr():
    reference, outputs = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
    result = sqnr.output_sqnr(reference, outputs)
    # The order of 48 additions differs: below 48 eps relative.
    assert result.pooled == pytest.approx(sqnr.sqnr(reference, outputs), abs=1e-12)
    assert result.per_step[1] == sqnr.sqnr(reference[1], outputs[1])


def test_an_exact_step_makes_the_mean_infinite_but_not_the_pool():
    reference = torch.ones(2, 3)
    outputs = reference.clone()
    outputs[1] += 1
    result = sqnr.output_sqnr(reference, outputs)
    assert result.per_step == [math.inf, 0.0]
    assert result.mean == math.inf
    assert result.pooled == pytest.approx(10 * math.log10(2), abs=1e-12)


def test_output_sqnr_wants_steps_and_images():
    with pytest.raises(ConfigError, match=r"must be \(steps, n, \.\.\.\)"):
        sqnr.output_sqnr(torch.ones(3), torch.ones(3))


# psnr


def test_psnr_is_per_image():
    reference = torch.zeros(3, 1, 4, 4)
    images = reference.clone()
    images[1] += 0.5
    images[2] += 2
    result = image_metrics.psnr(reference, images)
    assert result.dtype == torch.float64
    assert result[0] == math.inf
    assert result[1:].tolist() == pytest.approx([20 * math.log10(4), 0], abs=1e-12)


# Frechet distance


def test_identical_sets_are_at_distance_zero():
    features = normal(500, 64) @ normal(64, 64, seed=1)
    # eigh and svd are backward stable: errors of a few d * eps of the norms. The roots lose at
    # most their half where eigenvalues vanish, none do here; 100 leaves room for the constants.
    scale = float(torch.cov(features.T).trace())
    assert abs(image_metrics.frechet_distance(features, features)) <= 100 * 64 * EPS * scale


def test_distance_of_two_gaussians_with_exact_moments():
    a = whitened(300, 8, seed=0)
    deviations = torch.arange(1.0, 9.0, dtype=torch.float64)
    b = whitened(200, 8, seed=1) * deviations + 2
    # Diagonal covariances: sum of (1 - s)^2, plus 8 means apart by 2.
    expected = float((deviations - 1).square().sum()) + 8 * 4
    scale = float(deviations.square().sum()) + 8
    assert image_metrics.frechet_distance(a, b) == pytest.approx(
        expected, abs=100 * 300 * EPS * scale
    )


def test_distance_of_rotated_gaussians():
    # Commuting covariances in a rotated basis: the roots do the work, the value is known.
    rotation, _ = torch.linalg.qr(normal(6, 6))
    s, r = torch.linspace(0, 5, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    zero = torch.zeros(6, dtype=torch.float64)
    found = image_metrics.gaussian_distance(
        zero, (rotation * s**2) @ rotation.T, zero, (rotation * r**2) @ rotation.T
    )
    # One eigenvalue is 0: eigh returns up to 6 eps * 25 for it, whose root is the error, 2e-7.
    tolerance = 2 * 10 * math.sqrt(6 * EPS * 25)
    assert found == pytest.approx(float((s - r).square().sum()), abs=tolerance)


def test_distance_agrees_with_the_general_matrix_root():
    from scipy.linalg import sqrtm

    a, b = normal(400, 16), normal(300, 16, seed=1) @ normal(16, 16, seed=2) + 1
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(sqrtm((ca @ cb).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (ca + cb - 2 * root).trace()
    # sqrtm is accurate to eps times its own condition number, here below 1e4.
    assert image_metrics.frechet_distance(a, b) == pytest.approx(
        float(expected), rel=1e4 * 16 * EPS
    )


def test_distance_with_fewer_rows_than_dimensions_stays_finite_and_zero():
    features = normal(10, 64)
    scale = float(torch.cov(features.T).trace())
    # Singular covariances: each of the 64 roots is wrong by up to sqrt(eps * largest).
    tolerance = 2 * 64 * math.sqrt(64 * EPS) * scale
    assert abs(image_metrics.frechet_distance(features, features)) <= tolerance


def test_distance_refuses_other_shapes():
    with pytest.raises(ConfigError, match="dimensions differ: 3 and 4"):
        image_metrics.frechet_distance(torch.ones(5, 3), torch.ones(5, 4))
    with pytest.raises(ConfigError, match="n >= 2"):
        image_metrics.frechet_distance(torch.ones(1, 3), torch.ones(5, 3))


# bootstrap


def test_interval_is_repeatable_ordered_and_does_not_touch_the_global_generator():
    generated, real = normal(200, 4) + 0.5, normal(300, 4, seed=1)
    state = torch.get_rng_state()
    intervals = [
        image_metrics.bootstrap_interval(
            generated, real, samples=100, generator=torch.Generator().manual_seed(7)
        )
        for _ in range(2)
    ]
    assert intervals[0] == intervals[1]
    low, high = intervals[0]
    assert low < image_metrics.frechet_distance(generated, real) < high
    assert torch.equal(torch.get_rng_state(), state)


def test_a_higher_level_gives_a_wider_interval():
    generated, real = normal(100, 3), normal(100, 3, seed=1)

    def interval(level):
        generator = torch.Generator().manual_seed(0)
        return image_metrics.bootstrap_interval(
            generated, real, samples=50, level=level, generator=generator
        )

    (a, b), (c, d) = interval(0.5), interval(0.99)
    assert c < a < b < d


def test_interval_of_equal_sets_does_not_go_below_zero():
    features = normal(50, 8)
    generator = torch.Generator().manual_seed(0)
    low, high = image_metrics.bootstrap_interval(
        features, features, samples=50, generator=generator
    )
    assert low == 0 < high


@pytest.mark.parametrize("bad", [{"samples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_interval_refuses_bad_options(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        image_metrics.bootstrap_interval(
            normal(9, 2), normal(9, 2), generator=torch.Generator(), **bad
        )


# confidence


def test_confident_share_counts_rows_above_the_threshold():
    logits = torch.tensor([[10.0, 0.0], [0.0, 0.0], [0.0, 10.0], [1.0, 0.0]])
    assert image_metrics.confident_share(logits) == 0.5
    assert image_metrics.confident_share(logits, threshold=0.4) == 1.0
    with pytest.raises(ConfigError, match="logits"):
        image_metrics.confident_share(torch.ones(3))


# sampling


class StubScheduler:
    """x_{t-1} = x_t - output, over timesteps steps-1 ... 0; checks that eta is 0."""

    init_noise_sigma = 2.0

    def set_timesteps(self, steps, device=None):
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device)

    def step(self, output, t, x, *, eta, return_dict):
        assert eta == 0.0
        assert not return_dict
        return (x - output,)


@pytest.mark.parametrize(
    "wrap", [lambda y: y, lambda y: (y, "more"), lambda y: SimpleNamespace(sample=y)]
)
def test_sample_follows_the_scheduler_and_reads_every_kind_of_answer(wrap):
    images = scheduler_sampling.sample(
        lambda x, t: wrap(x / 2), StubScheduler(), (5, 1, 2, 2), num_inference_steps=3
    )
    noise = scheduler_sampling.initial_noise((5, 1, 2, 2), seed=0)
    assert torch.equal(images, noise * 2 / 8)  # powers of two: exact


def test_batch_size_changes_nothing_but_the_batches():
    sizes = []

    def denoiser(x, t):
        sizes.append(len(x))
        return x * (t + 1) / 8

    def run(batch_size):
        return scheduler_sampling.sample(
            denoiser,
            StubScheduler(),
            (5, 1, 2, 2),
            num_inference_steps=2,
            seed=3,
            batch_size=batch_size,
        )

    whole, parts = run(5), run(2)
    assert sizes == [5, 5, 2, 2, 2, 2, 1, 1]
    assert torch.equal(whole, parts)  # elementwise arithmetic: exact


def test_a_trajectory_keeps_what_the_denoiser_saw_even_if_it_reuses_its_buffer():
    buffer = torch.empty(4, 1, 2, 2)

    def denoiser(x, t):
        return buffer.copy_(x / 2)

    images, trajectory = scheduler_sampling.record_trajectory(
        denoiser, StubScheduler(), (4, 1, 2, 2), num_inference_steps=3
    )
    assert trajectory.timesteps.tolist() == [2, 1, 0]
    assert trajectory.inputs.shape == trajectory.outputs.shape == (3, 4, 1, 2, 2)
    assert torch.equal(trajectory.outputs, trajectory.inputs / 2)
    assert torch.equal(images, trajectory.inputs[-1] - trajectory.outputs[-1])


def test_noise_of_a_longer_run_begins_with_that_of_a_shorter_one():
    short, long = (scheduler_sampling.initial_noise((n, 3, 5), seed=1) for n in (2, 7))
    assert torch.equal(short, long[:2])
    assert not torch.equal(short, scheduler_sampling.initial_noise((2, 3, 5), seed=2))
    assert not torch.equal(long[0], long[1])


def test_sample_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    scheduler_sampling.sample(lambda x, t: x, StubScheduler(), (2, 3), num_inference_steps=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"num_inference_steps": 0}])
def test_sample_refuses_bad_options(bad):
    options = {"num_inference_steps": 2, **bad}
    with pytest.raises(ConfigError, match=next(iter(bad))):
        scheduler_sampling.sample(lambda x, t: x, StubScheduler(), (2, 3), **options)
    with pytest.raises(ConfigError, match="shape"):
        scheduler_sampling.sample(lambda x, t: x, StubScheduler(), (0, 3), num_inference_steps=2)


def test_a_perfect_denoiser_of_one_image_returns_it():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    target = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)

    def denoiser(x, t):
        keep = scheduler.alphas_cumprod[t]
        return (x - keep.sqrt() * target) / (1 - keep).sqrt()

    images = scheduler_sampling.sample(denoiser, scheduler, (3, 1, 4, 4), num_inference_steps=10)
    # x0 is recovered as (x - sqrt(1-a) eps) / sqrt(a) from the last step alone, where a is near 1:
    # a handful of fp32 roundings of values below 4.
    torch.testing.assert_close(
        images, target.expand(3, -1, -1, -1), rtol=0, atol=32 * torch.finfo(torch.float32).eps
    )
