"""judge: a model quantized, sampled and measured against full precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.subjects import tiny_subject
from tfmq_fx.api import compile, save
from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.core.config import Config, ReconstructionSpec, TemporalSpec
from tfmq_fx.core.errors import BackendError
from tfmq_fx.evaluation import image_metrics
from tfmq_fx.evaluation.benchmark import Benchmark, QualityMeter, seeds_of, whole_batches
from tfmq_fx.evaluation.image_quality import extract_features
from tfmq_fx.evaluation.recipes import nearest
from tfmq_fx.evaluation.subjects import as_function
from tfmq_fx.quant import sqnr
from tfmq_fx.serialization.artifact import saved_bytes

STEPS, BATCH = 2, 8


def quick(bits):
    """Nearest rounding at `bits` without calibrating on hundreds of images."""
    config = nearest(bits)
    spec = dataclasses.replace(config.reconstruction, samples=16)
    return dataclasses.replace(config, reconstruction=spec)


EXACT = Config(name="tables", temporal=TemporalSpec(mode="table"))


@pytest.fixture(scope="module")
def bench():
    return Benchmark(tiny_subject(), steps=STEPS, batch=BATCH)


@pytest.fixture(scope="module")
def judge(bench):
    real = extract_features(bench.subject.classifier(), bench.subject.images())
    return QualityMeter(bench, real, seed=1, samples=16, backend="eager")


@pytest.fixture(scope="module")
def coarse(bench):
    return bench.quantize(quick("w4a8"), 0)


def test_no_two_seeds_share_noise_and_nothing_is_judged_on_what_it_was_calibrated_with():
    drawn = [seed for i in range(5) for seed in seeds_of(i)]
    assert len(set(drawn)) == 10


def test_batches_are_whole():
    assert [whole_batches(n, 8) for n in (1, 8, 9)] == [8, 8, 16]


def test_calibration_draws_what_the_recipe_uses_in_whole_batches(bench, monkeypatch):
    seen = {}

    def calibrate(prepared, source, **options):
        seen.update(options)
        raise BackendError("enough")

    monkeypatch.setattr("tfmq_fx.api.calibrate", calibrate)
    config = Config(reconstruction=ReconstructionSpec(samples=35))
    with pytest.raises(BackendError):
        bench.quantize(config, 7)
    assert (seen["samples"], seen["batch_size"], seen["seed"]) == (24, BATCH, 7)
    assert seen["class_labels"].shape == (24,) and seen["num_inference_steps"] == STEPS


def test_full_precision_is_judged_by_its_images_alone(judge):
    figures, images = judge.full_precision()
    assert torch.equal(images, judge.reference.images[:BATCH])
    assert len(judge.reference.images) == 16
    assert figures.images.fid > 0 and figures.images.class_agreement is not None
    assert figures.pairs is None and figures.sqnr is None and figures.weights is None
    assert figures.bytes == sum(p.nbytes for p in judge.bench.model.parameters())
    assert (figures.backend, figures.backend_note) == ("eager", None)


def test_an_exact_model_has_no_noise(judge):
    converted, seconds = judge.bench.quantize(EXACT, 0)
    figures, images = judge.measure(converted, seconds)
    # batches of rows add up in another order than rows of the table: float32 leaves 120 dB
    assert min(figures.sqnr, figures.sqnr_pooled, figures.pairs.psnr) > 120
    assert figures.pairs.ssim == pytest.approx(1) and figures.pairs.feature_distance < 1e-5
    assert figures.temporal_worst == 0 and figures.weights == 0
    assert (images - judge.reference.images[:BATCH]).abs().max() < 1e-5


def test_figures_of_a_coarse_model_are_what_its_parts_say(judge, coarse, tmp_path):
    converted, seconds = coarse
    figures, images = judge.measure(converted, seconds)
    assert figures.quantize_seconds == seconds
    trajectory = judge.bench.trajectory(judge.sample_seed)
    expected = judge.reference.images
    torch.testing.assert_close(
        trajectory.inputs[0], scheduler_sampling.initial_noise((8, 3, 8, 8), seed=3)
    )
    step = trajectory.timesteps[-1].expand(BATCH)
    with torch.no_grad():
        last = converted(trajectory.inputs[-1], step, class_labels=judge.labels[:BATCH]).sample
    assert figures.sqnr_by_step[-1] == sqnr.sqnr(trajectory.outputs[-1], last)
    assert figures.sqnr == pytest.approx(sum(figures.sqnr_by_step) / STEPS)
    assert 0 < figures.temporal_mean <= figures.temporal_worst < 1
    assert (figures.weights, figures.inputs) == (1, 1)
    drawn = judge.bench.sample(as_function(converted), 16, judge.sample_seed)
    assert torch.equal(drawn[:BATCH], images)
    assert figures.pairs.psnr == pytest.approx(float(image_metrics.psnr(expected, drawn).mean()))
    save(converted, tmp_path / "model")
    assert figures.bytes == saved_bytes(tmp_path / "model")


def test_where_nothing_compiles_it_samples_eagerly_and_says_why(bench, judge, coarse, monkeypatch):
    def refuse(model, backend):
        raise BackendError(f"backend {backend!r}: no compiler")

    monkeypatch.setattr("tfmq_fx.api.compile", refuse)
    other = QualityMeter(bench, judge.real, seed=1, samples=16, backend="inductor")
    other.reference = judge.reference
    figures, _ = other.measure(*coarse)
    assert figures.backend == "eager"
    assert figures.backend_note == "BackendError: backend 'inductor': no compiler"


def test_output_sqnr_is_that_of_the_eager_reference_whatever_samples(
    bench, judge, coarse, monkeypatch
):
    class Louder(torch.nn.Module):
        """A compiled model that answers something else."""

        def __init__(self, model):
            super().__init__()
            self.model = compile(model, "eager")

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs).sample * 1.1

    monkeypatch.setattr("tfmq_fx.api.compile", lambda model, backend: Louder(model))
    other = QualityMeter(bench, judge.real, seed=1, samples=16, backend="inductor")
    other.reference = judge.reference
    figures, _ = other.measure(*coarse)
    plain, _ = judge.measure(*coarse)
    assert figures.backend == "inductor" and figures.sqnr == plain.sqnr
    assert figures.pairs.psnr < plain.pairs.psnr
