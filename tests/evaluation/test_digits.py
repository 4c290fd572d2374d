"""The shipped models and images: they load, are what the text says, and are repeatable."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation import digits, image_metrics

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def train():
    return digits.load_images("train")


@pytest.fixture(scope="module")
def heldout():
    return digits.load_images("heldout")


@pytest.fixture(scope="module")
def unet():
    return digits.load_unet()


# images


def test_images_have_the_documented_shapes_and_range(train, heldout):
    for (images, labels), n in ((train, 1497), (heldout, 300)):
        assert images.shape == (n, 1, 16, 16)
        assert images.dtype == torch.float32
        assert images.min() == -1
        assert images.max() == 1
        assert labels.shape == (n,)
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(10))


def test_the_split_is_repeatable_and_leaves_no_image_in_both(train, heldout):
    again = digits.load_images("heldout")
    assert torch.equal(again[0], heldout[0])
    assert torch.equal(again[1], heldout[1])
    # By content and not just by row: no scan occurs twice.
    scans = {image.numpy().tobytes() for images, _ in (train, heldout) for image in images}
    assert len(scans) == 1797


def test_split_indices_are_stratified_disjoint_and_complete():
    labels = torch.arange(1797) % 7 % 4
    rows = {split: digits.split_indices(labels, split) for split in ("train", "heldout")}
    assert torch.cat(list(rows.values())).sort().values.tolist() == list(range(1797))
    assert rows["heldout"].numel() == 300
    share = labels.bincount() * 300 / 1797
    # Largest remainders: every class is within one image of its share.
    assert (labels[rows["heldout"]].bincount() - share).abs().max() < 1


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match='"train" or "heldout", got \'test\''):
        digits.load_images("test")


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("sklearn.datasets", lambda: digits.load_images("train")),
        ("diffusers", digits.load_unet),
        ("diffusers", digits.make_scheduler),
        ("safetensors.torch", digits.load_classifier),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as caught:
        call()
    assert any("tfmq_fx[demo]" in note for note in caught.value.__notes__)


# classifier


def test_classifier_is_accurate_and_confident_on_heldout_images(heldout):
    images, labels = heldout
    model = digits.load_classifier()
    assert not model.training
    with torch.no_grad():
        logits, features = model(images), model.features(images)
    assert logits.shape == (300, 10)
    assert features.shape == (300, 64)
    assert (logits.argmax(1) == labels).float().mean() >= 0.97
    assert image_metrics.confident_share(logits) >= 0.95


# scheduler


def test_scheduler_has_the_schedule_of_training():
    scheduler = digits.make_scheduler(20)
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.timesteps.tolist() == list(range(950, -1, -50))
    expected = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    assert torch.equal(scheduler.alphas_cumprod, expected)


@pytest.mark.parametrize("steps", [0, 1001])
def test_scheduler_refuses_other_numbers_of_steps(steps):
    with pytest.raises(ConfigError, match=f"1 to 1000, got {steps}"):
        digits.make_scheduler(steps)


# denoiser


def test_unet_loads_through_diffusers_with_every_weight(unet):
    from diffusers import UNet2DModel

    loaded, info = UNet2DModel.from_pretrained(digits.UNET_FOLDER, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not unet.training
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    for (name, ours), (_, theirs) in zip(
        unet.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs.float()), name


def test_assets_stay_small():
    total = sum(file.stat().st_size for file in digits.ASSETS.rglob("*") if file.is_file())
    assert total <= 20 * 10**6  # with the glyphs'


def test_unet_removes_noise_it_was_trained_to_remove(unet, heldout):
    images = heldout[0][:64]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    keep = digits.make_scheduler().alphas_cumprod
    for t, best in ((50, 0.5), (300, 0.2), (700, 0.1)):
        x = keep[t].sqrt() * images + (1 - keep[t]).sqrt() * noise
        with torch.no_grad():
            error = (unet(x, t).sample - noise).square().mean()
        assert error < best, t  # an answer of zeros scores 1


def test_samples_look_like_digits_to_the_classifier(unet, train):
    drawn = scheduler_sampling.sample(
        unet, digits.make_scheduler(), (96, 1, 16, 16), num_inference_steps=10, batch_size=96
    )
    assert drawn.shape == (96, 1, 16, 16)
    assert drawn.abs().max() <= 1  # the scheduler clips its estimate of the image
    model = digits.load_classifier()
    with torch.no_grad():
        logits = model(drawn)
        near = image_metrics.frechet_distance(model.features(drawn), model.features(train[0]))
        noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        far = image_metrics.frechet_distance(model.features(noise), model.features(train[0]))
    assert image_metrics.confident_share(logits) > 0.6
    assert near < far / 4
    assert logits.argmax(1).unique().numel() == 10


def test_loading_the_shipped_models_says_nothing_and_leaves_logging_as_it_was():
    script = (
        "import logging; from tfmq_fx.evaluation import digits; digits.load_unet(); "
        "digits.make_scheduler(); "
        "assert logging.root.manager.disable == logging.NOTSET"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
