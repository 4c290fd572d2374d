"""The generated images and the shipped transformer: repeatable, as described, and by class."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation import digits, glyphs, image_metrics

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

HELDOUT_SEED = 2  # neither the seed of training nor that of the figures


@pytest.fixture(scope="module")
def images():
    return glyphs.make_images(600, seed=HELDOUT_SEED)


@pytest.fixture(scope="module")
def dit():
    return glyphs.load_dit()


# images


def test_images_have_the_documented_shapes_range_and_classes(images):
    pixels, labels = images
    assert pixels.shape == (600, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert -1 <= pixels.min() < -0.9
    assert 0.9 < pixels.max() <= 1
    assert labels.shape == (600,)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [60] * 10
    assert len(set(glyphs.GLYPHS)) == glyphs.CLASSES == 10


def test_images_follow_from_the_seed_and_the_first_do_not_depend_on_the_count(images):
    # 300 is more than one chunk and less than two.
    for count in (1, 300):
        again, labels = glyphs.make_images(count, seed=HELDOUT_SEED)
        assert torch.equal(again, images[0][:count])
        assert torch.equal(labels, images[1][:count])
    other, _ = glyphs.make_images(20, seed=HELDOUT_SEED + 1)
    assert (other - images[0][:20]).abs().flatten(1).amax(1).min() > 0.1


def test_no_two_images_are_alike(images):
    apart = torch.cdist(images[0].flatten(1), images[0].flatten(1)).fill_diagonal_(torch.inf)
    assert apart.min() > 1


def test_images_are_coloured_and_ink_is_lighter_than_paper(images):
    pixels, _ = images
    assert (pixels.amax(1) - pixels.amin(1)).flatten(1).mean(1).min() > 0.05
    brightness = pixels.mean(1)
    corners = brightness[:, ::31, ::31].flatten(1).mean(1)  # away from the glyph
    assert (brightness.flatten(1).amax(1) > corners + 0.3).all()


@pytest.mark.parametrize("font", glyphs.FONTS)
def test_every_font_has_every_glyph(font):
    drawn = {glyphs._template(glyph, font).tobytes() for glyph in glyphs.GLYPHS}
    assert len(drawn) == 10
    for glyph in glyphs.GLYPHS:
        left, top, right, bottom = glyphs._template(glyph, font).getbbox()
        # Near the centre, and filling what turning and scaling leave of the canvas.
        assert max(abs(left + right - 64), abs(top + bottom - 64)) <= 8
        assert 37 <= max(right - left, bottom - top) <= 46


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_an_impossible_request_is_refused(count, seed):
    with pytest.raises(ConfigError, match=f"got {count} and {seed}"):
        glyphs.make_images(count, seed=seed)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("matplotlib", lambda: glyphs.make_images(1, seed=0)),
        ("PIL.ImageFont", lambda: glyphs.make_images(1, seed=0)),
        ("diffusers", glyphs.load_dit),
        ("diffusers", glyphs.make_scheduler),
        ("safetensors.torch", glyphs.load_classifier),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, package, call):
    glyphs._template.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as caught:
        call()
    assert any("tfmq_fx[demo]" in note for note in caught.value.__notes__)


# classifier


def test_classifier_is_accurate_and_confident_on_unseen_images(images):
    model = glyphs.load_classifier()
    assert not model.training
    with torch.no_grad():
        logits, features = model(images[0]), model.features(images[0])
    assert logits.shape == (600, 10)
    assert features.shape == (600, 64)
    assert (logits.argmax(1) == images[1]).float().mean() >= 0.99
    assert image_metrics.confident_share(logits) >= 0.97


# denoiser


def test_dit_loads_through_diffusers_with_every_weight(dit):
    from diffusers import DiTTransformer2DModel

    loaded, info = DiTTransformer2DModel.from_pretrained(
        glyphs.DIT_FOLDER, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not dit.training
    assert loaded.config.norm_type == "ada_norm_zero"
    assert loaded.config.sample_size == glyphs.IMAGE_SIZE
    assert sum(p.numel() for p in dit.parameters()) == 2_665_056
    for (name, ours), (_, theirs) in zip(
        dit.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float()), name
        assert ours.isfinite().all(), name


@pytest.mark.parametrize("folder", [glyphs.DIT_FOLDER, glyphs.UNET_FOLDER])
def test_weights_are_stored_in_half_precision(folder):
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    assert {v.dtype for v in load_file(file).values()} == {torch.float16}


def test_unet_loads_through_diffusers_with_every_weight():
    from diffusers import UNet2DModel

    ours = glyphs.load_unet()
    loaded, info = UNet2DModel.from_pretrained(glyphs.UNET_FOLDER, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not ours.training and sum(p.numel() for p in ours.parameters()) == 2_737_507
    for (name, value), (_, theirs) in zip(
        ours.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert value.dtype == torch.float32 and value.isfinite().all(), name
        assert torch.equal(value, theirs.float()), name


@torch.no_grad()
def test_unet_draws_what_it_is_asked_for():
    model, asked = glyphs.load_unet(), torch.arange(20) % glyphs.CLASSES

    def denoiser(x, t):
        return model(x, t.expand(len(x)), class_labels=asked)

    drawn = scheduler_sampling.sample(
        denoiser, glyphs.make_scheduler(), (20, 3, 32, 32), num_inference_steps=10
    )
    # 99.7 % of 2,000 at 20 steps
    logits = glyphs.load_classifier()(drawn.clamp(-1, 1))
    assert float((logits.argmax(1) == asked).float().mean()) >= 0.9


def test_assets_stay_small():
    folders = (glyphs.DIT_FOLDER, glyphs.UNET_FOLDER)
    files = [glyphs.CLASSIFIER_FILE, *(file for folder in folders for file in folder.iterdir())]
    assert sum(file.stat().st_size for file in files) <= 12 * 10**6


def test_the_package_carries_the_assets():
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        file
        for pattern in settings["package-data"]["tfmq_fx.evaluation"]
        for file in digits.ASSETS.parent.glob(pattern)
    }
    folders = (glyphs.DIT_FOLDER, glyphs.UNET_FOLDER)
    assert glyphs.CLASSIFIER_FILE in listed
    assert {file for folder in folders for file in folder.iterdir()} <= listed


def test_scheduler_is_that_of_the_digits_for_velocities():
    ours, theirs = glyphs.make_scheduler(20), digits.make_scheduler(20)
    assert ours.config.prediction_type == "v_prediction"
    assert dict(ours.config) == dict(theirs.config) | {"prediction_type": "v_prediction"}
    assert torch.equal(ours.timesteps, theirs.timesteps)
    with pytest.raises(ConfigError, match="1 to 1000, got 0"):
        glyphs.make_scheduler(0)


@torch.no_grad()
def test_dit_estimates_images_better_when_told_their_class(dit, images):
    clean, labels = images[0][:50], images[1][:50]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    # The best estimate without looking, the mean of all, is wrong by the variance, 0.13.
    for t, best in ((50, 0.005), (300, 0.045), (600, 0.1)):
        keep = glyphs.make_scheduler().alphas_cumprod[t]
        x = keep.sqrt() * clean + (1 - keep).sqrt() * noise
        errors = []
        for told in (labels, torch.full_like(labels, glyphs.NO_CLASS), (labels + 5) % 10):
            velocity = dit(x, timestep=torch.full((50,), t), class_labels=told).sample
            estimate = keep.sqrt() * x - (1 - keep).sqrt() * velocity
            errors.append(float((estimate - clean).square().mean()))
        right, unknown, wrong = errors
        assert right < best, t
        if t > 50:  # later the image itself shows what it is
            assert right < unknown < wrong, t


def test_samples_show_the_glyph_asked_for(dit, images):
    asked = torch.arange(50) % 10

    def denoiser(x, t):
        return dit(x, timestep=t.expand(len(x)), class_labels=asked).sample

    drawn = scheduler_sampling.sample(
        denoiser, glyphs.make_scheduler(), (50, 3, 32, 32), num_inference_steps=10
    )
    assert drawn.isfinite().all()
    assert drawn.abs().max() <= 1  # the scheduler clips its estimate of the image
    model = glyphs.load_classifier()
    with torch.no_grad():
        logits, real = model(drawn), model.features(images[0])
        near = image_metrics.frechet_distance(model.features(drawn), real)
        noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        far = image_metrics.frechet_distance(model.features(noise), real)
    assert (logits.argmax(1) == asked).float().mean() >= 0.8
    assert near < far / 4
