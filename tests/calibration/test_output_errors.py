"""correction: sums over batches give the regression and the held-out choice."""

import pytest
import torch
from torch import nn

from tests.ir.test_sites import graph_of
from tests.passes.test_quantize_layers import as_tensor
from tests.toys import ToyUNet, TupleOutput, seeded
from tfmq_fx.calibration.output_errors import OutputErrors, measure_errors, obstacle
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import CalibrationError, ConfigError

TIMES = torch.tensor([0, 3, 7, 9])
K = torch.tensor([0.2, -0.3, 0.05, 0.0], dtype=torch.float64)
CHANNELS = 3
SHIFT = torch.arange(12.0).view(4, CHANNELS).double() / 10 - 0.4
STD = 0.05


class Estimate(nn.Module):
    """x itself, or (1 + k) x + D + noise with k and D of each timestep."""

    def __init__(self, exact=False, channels=1):
        super().__init__()
        self.exact, self.channels = exact, channels
        self.register_buffer("k", torch.zeros(10, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(10, CHANNELS, dtype=torch.float64))
        self.k[TIMES], self.shift[TIMES] = K, SHIFT

    def forward(self, x, t, noise):
        if self.exact:
            return x + 0.0 * noise + 0.0 * t.view(-1, *[1] * (x.dim() - 1))
        shape = [-1] + [1] * (x.dim() - 1)
        wide = list(shape)
        wide[self.channels] = CHANNELS
        return x * (1 + self.k[t].view(shape)) + self.shift[t].view(wide) + noise


def captured(model, shape):
    example = {
        "x": torch.randn(2, *shape).double(),
        "t": torch.tensor([3, 7]),
        "noise": torch.randn(2, *shape).double(),
    }
    return capture(model, example, timestep="t").gm


def pair(shape=(CHANNELS, 6, 6), channels=1):
    return captured(Estimate(True), shape), captured(Estimate(False, channels), shape)


def chunks(shape=(CHANNELS, 6, 6), times=TIMES, batches=20, size=16, std=STD, seed=0):
    """Batches of mixed timesteps, each equally often."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        x = 0.5 + torch.randn(size, *shape, generator=generator).double()
        noise = torch.randn(size, *shape, generator=generator).double() * std
        picks = torch.arange(size) % len(times)
        yield x, times[picks[torch.randperm(size, generator=generator)]], noise


@pytest.fixture(scope="module")
def known():
    return measure_errors(*pair(), list(chunks()), timesteps=TIMES)


def test_the_planted_slope_and_mean_are_found(known):
    # 80 samples of 108 values at each timestep. The slope's standard error is STD / sqrt(n), the
    # mean's in one channel sqrt(k^2 + STD^2) / sqrt(n / 3); five of each is 0.003 and 0.03.
    assert known.samples.sum(0).tolist() == [80] * 4
    assert known.samples[0].tolist() == known.samples[1].tolist()
    noise, bias = known.correction("noise"), known.correction("bias")
    assert noise.interpolated == bias.interpolated == 0
    assert (noise.k - K).abs().max() < 0.003
    expected = SHIFT + 0.5 * K[:, None]
    assert (bias.shift - expected).abs().max() < 0.03


def test_it_is_least_squares(known):
    """The same numbers from torch.linalg.lstsq on all values at once."""
    reference, gm = pair()
    rows = [[], []]
    for x, t, noise in chunks():
        mine = t == 3
        rows[0].append(as_tensor(reference(x, t, noise))[mine])
        rows[1].append(as_tensor(gm(x, t, noise))[mine] - rows[0][-1])
    e, d = (torch.cat(part).movedim(1, -1).reshape(-1, CHANNELS) for part in rows)
    columns = torch.zeros(e.numel(), 1 + CHANNELS).double()
    columns[:, 0] = e.flatten()
    columns[:, 1:] = torch.eye(CHANNELS).double().repeat(len(e), 1)
    solved = torch.linalg.lstsq(columns, d.flatten()[:, None]).solution.flatten()
    found = known.correction("noise")
    # normal equations in float64, condition about 10
    assert abs(float(found.k[1] - solved[0])) < 1e-12
    assert (found.shift[1] - solved[1:]).abs().max() < 1e-12


@pytest.mark.parametrize(("shape", "channels"), [((5, CHANNELS), 2), ((CHANNELS, 2, 3, 3), 1)])
def test_channels_of_tokens_are_last_and_of_videos_first(shape, channels):
    errors = measure_errors(*pair(shape, channels), list(chunks(shape)), timesteps=TIMES)
    expected = SHIFT + 0.5 * K[:, None]
    shift = errors.correction("bias").shift
    assert shift.shape == (4, CHANNELS)
    # 80 samples of 5 values a channel or more: five standard errors of sqrt(k^2 + STD^2) / 20
    assert (shift - expected).abs().max() < 0.08


def test_corrections_are_kept_where_they_help_samples_they_were_not_fitted_on(known):
    noise, bias = known.correction("noise"), known.correction("bias")
    assert noise.corrected.tolist() == [True] * 4  # a mean at every t, 0.5 and more in a channel
    assert (noise.k - K).abs().max() < 0.003 and not bias.k.any()
    # what is left of (1 + k) e + D + noise by each, over a mean square of 1.25
    wanted = (STD**2 / (1 + K) ** 2).mean() / 1.25
    assert noise.after == pytest.approx(float(wanted), rel=0.1) and noise.after < noise.before / 10
    assert noise.after < bias.after < bias.before == noise.before


def test_a_slope_whose_inverse_amplifies_the_noise_is_not_applied():
    """Dividing by 0.7 doubles a noise of variance 1; the slope costs 0.09 of a power of 1."""
    found = measure_errors(*pair(), list(chunks(std=1.0)), timesteps=TIMES).correction("noise")
    assert found.k[1] == 0 and found.corrected[1] and found.k[0] > 0.1
    assert (found.shift[1] - SHIFT[1] - 0.5 * K[1]).abs().max() < 0.1  # 5 sqrt(1.09 / 2880)


def test_pure_noise_is_left_alone():
    """Means of two halves agree by chance now and then, never on much."""
    reference = captured(Estimate(True), (CHANNELS, 6, 6))
    noisy = Estimate()
    noisy.k.zero_(), noisy.shift.zero_()
    gm = captured(noisy, (CHANNELS, 6, 6))
    times = torch.arange(10)
    data = list(chunks(times=times, batches=2, size=10, std=0.3))
    errors = measure_errors(reference, gm, data, timesteps=times)
    found = errors.correction("noise")
    off = ~found.corrected
    assert off.sum() >= 5 and not found.k[off].any() and not found.shift[off].any()
    assert found.after <= found.before
    # a mean of 72 values, five standard errors; a slope of 216, as many
    assert found.shift.abs().max() < 5 * 0.3 / 72**0.5 and found.k.abs().max() < 5 * 0.3 / 216**0.5


def test_timesteps_without_two_samples_take_after_their_neighbours():
    reference, gm = pair()
    times = torch.tensor([0, 1, 3, 5, 7, 9])
    data = list(chunks(times=torch.tensor([0, 3, 7, 9])))
    data.append((data[0][0][:1], torch.tensor([5]), data[0][2][:1]))
    errors = measure_errors(reference, gm, data, timesteps=times)
    assert errors.measured.tolist() == [True, False, True, False, True, True]
    found = errors.correction("noise")
    assert found.interpolated == 2
    assert found.k[1] == pytest.approx(float(found.k[0] * 2 / 3 + found.k[2] / 3))
    assert torch.allclose(found.shift[3], (found.shift[2] + found.shift[4]) / 2)


def test_an_output_that_opposes_full_precision_is_refused():
    class Opposed(Estimate):
        def forward(self, x, t, noise):
            return -0.5 * x + noise + 0.0 * t.view(-1, 1, 1, 1)

    shape = (CHANNELS, 4, 4)
    reference, gm = captured(Estimate(True), shape), captured(Opposed(), shape)
    errors = measure_errors(reference, gm, list(chunks(shape)), timesteps=TIMES)
    with pytest.raises(ConfigError, match=r"against full precision at timestep 0 \(k = -1.5\)"):
        errors.correction("noise")
    assert errors.correction("bias").corrected.any()  # x has a mean


def test_too_few_samples_and_unknown_kinds_are_refused(known):
    one = [tuple(part[:1] for part in chunk) for chunk in list(chunks())[:1]]
    errors = measure_errors(*pair(), one, timesteps=TIMES)
    assert not errors.measured.any()
    with pytest.raises(CalibrationError, match="two calibration samples"):
        errors.correction("noise")
    with pytest.raises(ConfigError, match="'bias' or 'noise', got 'none'"):
        known.correction("none")


def test_bad_samples_are_refused():
    x, t, noise = next(chunks())
    with pytest.raises(CalibrationError, match="is of timestep 0, which is none of the 3"):
        measure_errors(*pair(), [(x, t, noise)], timesteps=TIMES[1:])
    noise[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=f"NaN or Inf on .* at timestep {t[0].item()}"):
        measure_errors(*pair(), [(x, t, noise)], timesteps=TIMES)


class PerPixel(nn.Module):
    def forward(self, x, t):
        return x.permute(1, 0) * 1.0, t * 1.0


class Counts(nn.Module):
    def forward(self, x, t):
        return (x > 0).long() + t[:, None]


def test_obstacles():
    assert obstacle(graph_of(seeded(ToyUNet).eval(), 3, 8, 8)) == ""
    assert obstacle(graph_of(seeded(TupleOutput).eval(), 4)) == ""
    turned = graph_of(PerPixel(), 4)
    assert obstacle(turned).endswith("is not the batch")
    assert obstacle(graph_of(Counts(), 4)) == "it is no floating-point tensor"
    data = [(torch.randn(2, 4), torch.tensor([0, 3]))] * 3
    errors = measure_errors(turned, turned, data, timesteps=TIMES)
    assert isinstance(errors, OutputErrors) and not errors.measured.any()


def test_the_first_of_several_outputs_counts():
    gm = graph_of(seeded(TupleOutput).eval(), 4)
    data = [(torch.randn(2, 4), torch.tensor([0, 3])) for _ in range(3)]
    errors = measure_errors(gm, gm, data, timesteps=TIMES)
    assert errors.sums.shape == (2, 4, 4, 6) and errors.samples.sum(0).tolist() == [3, 3, 0, 0]
    found = errors.correction("noise")
    assert not found.k.any() and not found.shift.any()
    assert not found.corrected.any()  # nothing to gain


def test_an_output_that_is_zero_at_one_timestep_has_no_share_in_the_relative_errors():
    reference, gm = pair()
    silent = [
        (torch.where((t == 7)[:, None, None, None], 0.0, x), t, noise) for x, t, noise in chunks()
    ]
    found = measure_errors(reference, gm, silent, timesteps=TIMES).correction("noise")
    plain = measure_errors(reference, gm, list(chunks()), timesteps=TIMES).correction("noise")
    assert 0 < found.after < found.before < 10
    assert found.corrected.tolist() == plain.corrected.tolist()

    def zeros():
        return ((torch.zeros_like(x), t, 0 * noise) for x, t, noise in chunks())

    nothing = measure_errors(reference, gm, zeros(), timesteps=TIMES).correction("bias")
    assert (nothing.before, nothing.after) == (0.0, 0.0)


def test_timesteps_that_were_not_measured_lie_between_their_neighbours_and_count_as_not_corrected():
    few = list(chunks(times=TIMES[[0, 3]]))
    found = measure_errors(*pair(), few, timesteps=TIMES).correction("bias")
    assert found.corrected.tolist() == [True, False, False, True]
    # the mean at 3 is a third of the way from that at 0 to that at 9
    between = found.shift[0] * 2 / 3 + found.shift[3] / 3
    assert torch.allclose(found.shift[1], between, rtol=1e-12, atol=0)
