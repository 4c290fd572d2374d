"""A tiny subject for evaluations: a random class-conditional UNet and a random classifier."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tests.toys import seeded, tiny_unet2d
from tfmq_fx.evaluation import digits
from tfmq_fx.evaluation.digits import ImageClassifier
from tfmq_fx.evaluation.subjects import Subject

SHAPE = (3, 8, 8)


def denoiser(scale: float = 1.0, classes: int | None = 10) -> nn.Module:
    """A UNet on 8x8 images."""
    model = tiny_unet2d(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    with torch.no_grad():
        model.conv_out.bias.mul_(scale)
    return model


def classifier() -> ImageClassifier:
    """Random features of 8x8 images."""
    return seeded(ImageClassifier, channels=3, size=8, widths=(8, 8)).eval()


def images(count: int = 48) -> Tensor:
    """Random images in [-1, 1]."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, *SHAPE, generator=generator) * 2 - 1


def tiny_subject(name: str = "tiny", *, classes: int | None = 10, scale: float = 1.0) -> Subject:
    """The whole of it. scale: other values give another model."""
    return Subject(
        name=name,
        load=functools.partial(denoiser, scale, classes),
        scheduler=digits.make_scheduler,
        classifier=classifier,
        images=images,
        reference="48 random images",
        shape=SHAPE,
        classes=classes,
    )
