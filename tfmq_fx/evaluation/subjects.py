"""The shipped models, each with its scheduler, classifier and reference images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.calibration.scheduler_steps import prediction
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.serialization.checkpoint import digest

from . import digits, glyphs
from .digits import ImageClassifier

GLYPH_IMAGES = 20_000  # what the denoisers of glyphs were trained on, of seed 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A trained denoiser with its scheduler, classifier and reference images.

    load: the denoiser, in eval mode, called with the sample, `timestep` (n,) and, where it takes
    one, `class_labels` (n,).  scheduler: a new DDIM scheduler.
    classifier: trained on the same data; its features are those of all Frechet distances.
    images: the reference images (m, channels, height, width) in [-1, 1].  reference: their
    description; it stands for them in the names of results, so other images need other words.
    shape: of one image.  sample_name: the sample's name among the inputs.
    classes: how many class labels there are; None where no label is an input.
    """

    name: str
    load: Callable[[], Any]
    scheduler: Callable[[], Any]
    classifier: Callable[[], ImageClassifier]
    images: Callable[[], Tensor]
    reference: str
    shape: tuple[int, int, int]
    sample_name: str = "sample"
    classes: int | None = None

    def conditions(self, samples: int) -> dict[str, Tensor]:
        """The further inputs for `samples` images: the classes in turn, where there are any."""
        if self.classes is None:
            return {}
        return {"class_labels": torch.arange(samples) % self.classes}

    def example(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Example inputs by name, for two images."""
        generator = torch.Generator().manual_seed(0)
        inputs = {
            self.sample_name: torch.randn(2, *self.shape, dtype=torch.float32, generator=generator),
            "timestep": torch.tensor([1, 1]),
            **self.conditions(2),
        }
        return {name: value.to(device) for name, value in inputs.items()}


_GLYPHS: dict[str, Any] = {
    "scheduler": glyphs.make_scheduler,
    "classifier": glyphs.load_classifier,
    "images": lambda: glyphs.make_images(GLYPH_IMAGES, seed=0)[0],
    "reference": "the 20,000 glyphs trained on",
    "shape": (3, glyphs.IMAGE_SIZE, glyphs.IMAGE_SIZE),
    "classes": glyphs.CLASSES,
}

SUBJECTS = {
    each.name: each
    for each in (
        Subject(
            name="digits",
            load=digits.load_unet,
            scheduler=digits.make_scheduler,
            classifier=digits.load_classifier,
            images=lambda: digits.load_images("train")[0],
            reference="the 1,497 digits trained on",
            shape=(1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
        ),
        Subject(name="glyphs-dit", load=glyphs.load_dit, sample_name="hidden_states", **_GLYPHS),
        Subject(name="glyphs-unet", load=glyphs.load_unet, **_GLYPHS),
    )
}
"""The shipped models by name."""


def find_subjects(models: Iterable[str | Subject] | None) -> list[Subject]:
    """The subjects with these names; Subjects pass through, None is all that ship.

    Raises ConfigError for an unknown name, for none, and for one twice.
    """
    if isinstance(models, (str, Subject)):
        models = [models]
    subjects = []
    for each in SUBJECTS.values() if models is None else models:
        if not isinstance(each, Subject) and each not in SUBJECTS:
            raise ConfigError(f"unknown model {each!r}; there are {', '.join(SUBJECTS)}")
        subjects.append(each if isinstance(each, Subject) else SUBJECTS[each])
    names = [each.name for each in subjects]
    if not subjects or len(set(names)) < len(names):
        raise ConfigError(f"give each model once, at least one; got {', '.join(names) or 'none'}")
    return subjects


def as_function(model: Any) -> Callable[..., Tensor]:
    """`model` as a function from a sample, one timestep for all rows, and conditions by name to the
    tensor that it predicts."""

    @torch.no_grad()
    def call(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        return prediction(model(x, t.expand(len(x)), **conditions))

    return call


def contents(*modules: nn.Module) -> str:
    """A digest of these modules' weights and buffers: sixteen hex digits."""
    return digest([dict(module.state_dict()) for module in modules])[:16]
