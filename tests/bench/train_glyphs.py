"""Train the classifier and the denoisers of `tfmq_fx.evaluation.glyphs` and write them as package
assets.

    python -m tests.bench.train_glyphs --only classifier
    python -m tests.bench.train_glyphs --only dit
    python -m tests.bench.train_glyphs --only unet --checkpoint glyphs-unet.ckpt
    python -m tests.bench.train_glyphs --only evaluate --model unet

The last measures what is in the assets and prints one line of JSON. All trainings are seeded.
A denoiser's stops after --iterations or --minutes, whichever comes first, and its learning rate
falls with whichever is nearer; an interrupted run continues from --checkpoint. Bit-for-bit
repetition needs the same machine and no limit of minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.bench import training
from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.evaluation import glyphs

TRAIN_IMAGES, TRAIN_SEED = 20_000, 0
HELDOUT_IMAGES, HELDOUT_SEED = 2_000, 1
WITHOUT_CLASS = 0.1  # share of the images whose class the denoiser is not told
DIT = {
    "sample_size": glyphs.IMAGE_SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 4,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 36,
    "norm_type": "ada_norm_zero",
    "num_embeds_ada_norm": glyphs.CLASSES,
}

UNET = {
    "sample_size": glyphs.IMAGE_SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "attention_head_dim": 32,
    "num_class_embeds": glyphs.CLASSES + 1,  # and none
}


def make_unet() -> Any:
    """An untrained denoiser of residual blocks and attention, told the class with the timestep."""
    from diffusers import UNet2DModel

    return UNet2DModel(**UNET)


def make_dit() -> Any:
    """An untrained denoiser, initialized as in the DiT paper: every block starts as identity.

    diffusers drops labels by chance inside each block; here one draw must serve all blocks, so
    theirs is switched off and `train_dit` makes its own.
    """
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**DIT)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    return model


MODELS = {
    "dit": (make_dit, glyphs.load_dit, glyphs.DIT_FOLDER),
    "unet": (make_unet, glyphs.load_unet, glyphs.UNET_FOLDER),
}


def train_denoiser(model: nn.Module, args: argparse.Namespace) -> dict[str, Tensor]:
    """Averaged weights of `model` after training."""
    images, labels = glyphs.make_images(TRAIN_IMAGES, seed=TRAIN_SEED)

    def predict(
        call: Any, noisy: Tensor, t: Tensor, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        hidden = torch.rand(len(rows), generator=generator) < WITHOUT_CLASS
        told = labels[rows].masked_fill(hidden, glyphs.NO_CLASS)
        # The fused attention kernel is slow backwards in bf16 on the CPU.
        with sdpa_kernel(SDPBackend.MATH):
            predicted: Tensor = call(noisy, timestep=t, class_labels=told).sample
        return predicted

    return training.train_denoiser(model, glyphs.make_scheduler(), images, predict, args)


def draw(model: Any, count: int, *, inference_steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples (count, 3, 32, 32) of a denoiser and the classes asked for, (count,).

    Classes take turns; there is no guidance.
    """

    def denoiser(x: Tensor, t: Tensor) -> Any:
        asked = torch.arange(len(x)) % glyphs.CLASSES  # every batch starts at class 0
        return model(x, timestep=t.expand(len(x)), class_labels=asked)

    drawn = scheduler_sampling.sample(
        denoiser,
        glyphs.make_scheduler(),
        (count, 3, glyphs.IMAGE_SIZE, glyphs.IMAGE_SIZE),
        num_inference_steps=inference_steps,
        seed=seed,
        batch_size=10 * glyphs.CLASSES,
        progress=True,
    )
    return drawn, torch.arange(count) % glyphs.CLASSES


def evaluate(
    denoiser: Any, *, count: int, inference_steps: int, seed: int, grid: Path | None
) -> dict[str, Any]:
    """Figures of a denoiser, judged by the shipped classifier: Frechet distances, class agreement,
    distance to training."""
    train, _ = glyphs.make_images(TRAIN_IMAGES, seed=TRAIN_SEED)
    heldout, labels = glyphs.make_images(HELDOUT_IMAGES, seed=HELDOUT_SEED)
    model = glyphs.load_classifier()
    drawn, asked = draw(denoiser, count, inference_steps=inference_steps, seed=seed)
    if grid is not None:
        training.save_grid(drawn, grid, zoom=3)
    return {
        "torch": torch.__version__,
        "samples": count,
        "inference_steps": inference_steps,
        "seed": seed,
        **training.quality(model, drawn, train, heldout, seed=seed),
        "class_agreement": training.accuracy(model, drawn, asked),
        "accuracy_heldout": training.accuracy(model, heldout, labels),
    }


def main() -> None:
    """Train what the arguments ask for and write the assets."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = training.arguments(summary, parts=tuple(MODELS), checkpoint="glyphs-dit.ckpt")
    parser.add_argument("--model", choices=MODELS, default="dit", help="the one to evaluate")
    parser.set_defaults(epochs=2)
    args = parser.parse_args()

    if args.only == "classifier":
        model = training.train_classifier(
            glyphs.GlyphClassifier,
            glyphs.make_images(TRAIN_IMAGES, seed=TRAIN_SEED),
            glyphs.make_images(HELDOUT_IMAGES, seed=HELDOUT_SEED),
            augment=lambda images, _: images,
            epochs=args.epochs,
            batch_size=64,
            seed=args.seed,
        )
        training.save_classifier(model, args.assets / glyphs.CLASSIFIER_FILE.name)
    elif args.only in MODELS:
        make, _, folder = MODELS[args.only]
        torch.manual_seed(args.seed)
        average = train_denoiser(make(), args)
        training.save_denoiser(make(), average, args.assets / folder.name)
    else:
        _, load, _ = MODELS[args.model]
        figures = evaluate(
            load(),
            count=args.samples,
            inference_steps=args.inference_steps,
            seed=args.seed,
            grid=args.grid,
        )
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
