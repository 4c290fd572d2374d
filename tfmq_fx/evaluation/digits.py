"""Load the small diffusion model of digits, its classifier, and the images of its training.

The 1,797 scanned 8x8 digits that scikit-learn carries, enlarged to 16x16; an unconditional
`diffusers.UNet2DModel` that draws more of them; and a classifier whose features serve the Frechet
distance. The weights ship with the package, so everything here works offline.

scikit-learn, diffusers and safetensors are imported when first needed; they come with
`pip install "tfmq_fx[demo]"`.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfmq_fx.core.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DModel

Split = Literal["train", "heldout"]
Prediction = Literal["epsilon", "v_prediction"]

ASSETS = Path(__file__).parent / "assets"
UNET_FOLDER = ASSETS / "digits-unet"
CLASSIFIER_FILE = ASSETS / "digits-classifier.safetensors"

IMAGE_SIZE = 16
CLASSES = 10
HELDOUT_IMAGES = 300
TRAINING_STEPS = 1000
FEATURES = 64
_SPLIT_SEED = 0


def demo_module(name: str) -> Any:
    """The module `name` of an optional package; without it the ImportError names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        error.add_note(f'the shipped models need {package}: pip install "tfmq_fx[demo]"')
        raise


def diffusers_class(name: str) -> Any:
    """A class of diffusers. Raises ImportError without it."""
    # Packages that diffusers imports log what they could not load for other devices.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return getattr(demo_module("diffusers"), name)
    finally:
        logging.disable(before)


def split_indices(labels: Tensor, split: Split) -> Tensor:
    """The rows of the split, ascending, int64 (n,): 300 held out, each class in its proportion.

    labels: (n,) integers, n > 300.  The same labels always give the same rows, and the two splits
    share none. Raises ConfigError for another name of a split.
    """
    if split not in ("train", "heldout"):
        raise ConfigError(f'split must be "train" or "heldout", got {split!r}')
    classes, counts = torch.unique(labels, return_counts=True)
    share = counts.double() * HELDOUT_IMAGES / labels.numel()
    quota = share.floor().long()
    # Rounding down leaves a few places free: they go to the classes that lost the largest part.
    free = HELDOUT_IMAGES - int(quota.sum())
    quota[torch.argsort(share - quota, descending=True, stable=True)[:free]] += 1
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    heldout = torch.zeros(labels.numel(), dtype=torch.bool)
    for label, places in zip(classes.tolist(), quota.tolist(), strict=True):
        rows = torch.nonzero(labels == label).flatten()
        heldout[rows[torch.randperm(rows.numel(), generator=generator)[:places]]] = True
    return torch.nonzero(heldout if split == "heldout" else ~heldout).flatten()


def load_images(split: Split) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 16, 16), float32 in [-1, 1], and labels (n,), int64 in [0, 9].

    split: "train" (n = 1,497) or "heldout" (n = 300).  -1 is paper, 1 is ink. The scans are 8x8
    with 17 levels of grey; they are enlarged bicubically and the overshoot is clipped. The split
    is by image: one writer's digits can be in both. Raises ConfigError for another name, and
    ImportError without scikit-learn.
    """
    data, target = demo_module("sklearn.datasets").load_digits(return_X_y=True)
    labels = torch.from_numpy(target).long()
    rows = split_indices(labels, split)
    small = torch.from_numpy(data).float().reshape(-1, 1, 8, 8)[rows] / 8 - 1
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return images.clamp(-1, 1), labels[rows]


class ImageClassifier(nn.Module):
    """A convolutional classifier of ten classes with a 64-dimensional feature layer."""

    def __init__(self, *, channels: int, size: int, widths: tuple[int, ...]) -> None:
        """channels, size: of the square images; widths: channels per stage, each halving them."""
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, stride=2), nn.SiLU()]
        pixels = (size >> len(widths)) ** 2
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(widths[-1] * pixels, FEATURES)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Features (n, 64) of images (n, channels, size, size), before the last nonlinearity."""
        return cast(Tensor, self.body(x))

    def feature_map(self, x: Tensor) -> Tensor:
        """The last feature map (n, maps, height, width) of such images, before it is flattened."""
        return cast(Tensor, self.body[:-3](x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, channels, size, size)."""
        return cast(Tensor, self.head(F.silu(self.features(x))))


class DigitClassifier(ImageClassifier):
    """A classifier of digits (n, 1, 16, 16)."""

    def __init__(self) -> None:
        super().__init__(channels=1, size=IMAGE_SIZE, widths=(32, 64))


def load_model(kind: str, folder: Path) -> Any:
    """A shipped denoiser, a diffusers model of class `kind`, float32 and in eval mode."""
    return diffusers_class(kind).from_pretrained(folder, local_files_only=True).float().eval()


Classifier = TypeVar("Classifier", bound=ImageClassifier)


def load_weights(model: Classifier, file: Path) -> Classifier:
    """`model` with the weights of a safetensors file, in eval mode."""
    model.load_state_dict(demo_module("safetensors.torch").load_file(file))
    return model.eval()


def load_unet() -> UNet2DModel:
    """The shipped denoiser, float32 and in eval mode: (n, 1, 16, 16) and timesteps to noise.

    A `UNet2DModel` of 2.5 million parameters that predicts the noise of the schedule in
    `make_scheduler`. The weights were rounded to fp16 once, on disk. Raises ImportError without
    diffusers.
    """
    return cast("UNet2DModel", load_model("UNet2DModel", UNET_FOLDER))


def load_classifier() -> DigitClassifier:
    """The shipped classifier, float32 and in eval mode. Raises ImportError without safetensors."""
    return load_weights(DigitClassifier(), CLASSIFIER_FILE)


def make_scheduler(
    num_inference_steps: int | None = None, *, prediction_type: Prediction = "epsilon"
) -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule of training: 1000 steps, beta 1e-4 to 0.02, linear.

    num_inference_steps: 1 to 1000 sets the timesteps; None leaves that to the caller.
    prediction_type: what the denoiser answers with; the digits' predicts the noise, "epsilon".
    Raises ConfigError for a number of steps outside that range, and ImportError without diffusers.
    """
    if num_inference_steps is not None and not 1 <= num_inference_steps <= TRAINING_STEPS:
        raise ConfigError(
            f"num_inference_steps must be 1 to {TRAINING_STEPS}, got {num_inference_steps}"
        )
    scheduler = diffusers_class("DDIMScheduler")(
        num_train_timesteps=TRAINING_STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=prediction_type,
        clip_sample=True,
    )
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps)
    return cast("DDIMScheduler", scheduler)
