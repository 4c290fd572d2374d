"""Train the classifier and the denoiser of `tfmq_fx.evaluation.digits` and write them as package
assets.

    python -m tests.bench.train_digits
    python -m tests.bench.train_digits --only evaluate

The second measures what is in the assets and prints one line of JSON. Both trainings are seeded.
The denoiser's stops after --iterations or --minutes, whichever comes first, and its learning rate
falls with whichever is nearer; an interrupted run continues from --checkpoint. Bit-for-bit
repetition needs the same machine and no limit of minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.bench import training
from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.evaluation import digits

UNET = {
    "sample_size": digits.IMAGE_SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (48, 96, 96),
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
}


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, 1, h, w), each moved by -1, 0 or 1 pixels each way; paper (-1) moves in."""
    n, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(0, 3, (2, n, 1, 1), generator=generator)
    rows = torch.arange(height).view(1, -1, 1) + down
    columns = torch.arange(width).view(1, 1, -1) + right
    return padded[torch.arange(n).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def make_unet() -> Any:
    """An untrained denoiser."""
    from diffusers import UNet2DModel

    return UNet2DModel(**UNET)


def train_unet(args: argparse.Namespace) -> dict[str, Tensor]:
    """Averaged weights of the trained denoiser."""
    torch.manual_seed(args.seed)
    images, _ = digits.load_images("train")

    def predict(
        call: Any, noisy: Tensor, t: Tensor, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        predicted: Tensor = call(noisy, t).sample
        return predicted

    return training.train_denoiser(make_unet(), digits.make_scheduler(), images, predict, args)


def evaluate(*, count: int, inference_steps: int, seed: int, grid: Path | None) -> dict[str, Any]:
    """Figures of the shipped models: Frechet distances, confidence, and distance to training."""
    train, _ = digits.load_images("train")
    heldout, labels = digits.load_images("heldout")
    model = digits.load_classifier()
    drawn = scheduler_sampling.sample(
        digits.load_unet(),
        digits.make_scheduler(),
        (count, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
        num_inference_steps=inference_steps,
        seed=seed,
        progress=True,
    )
    if grid is not None:
        training.save_grid(drawn, grid, zoom=4)
    return {
        "torch": torch.__version__,
        "samples": count,
        "inference_steps": inference_steps,
        "seed": seed,
        **training.quality(model, drawn, train, heldout, seed=seed),
        "accuracy_heldout": training.accuracy(model, heldout, labels),
    }


def main() -> None:
    """Train what the arguments ask for and write the assets."""
    summary = (__doc__ or "").partition("\n")[0]
    args = training.arguments(summary, parts=("unet",), checkpoint="digits-unet.ckpt").parse_args()

    if args.only in (None, "classifier"):
        model = training.train_classifier(
            digits.DigitClassifier,
            digits.load_images("train"),
            digits.load_images("heldout"),
            augment=shifted,
            epochs=args.epochs,
            batch_size=64,
            seed=args.seed,
        )
        training.save_classifier(model, args.assets / digits.CLASSIFIER_FILE.name)
    if args.only in (None, "unet"):
        average = train_unet(args)
        training.save_denoiser(make_unet(), average, args.assets / digits.UNET_FOLDER.name)
    if args.only == "evaluate":
        figures = evaluate(
            count=args.samples,
            inference_steps=args.inference_steps,
            seed=args.seed,
            grid=args.grid,
        )
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
