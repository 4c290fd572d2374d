"""What the scripts that train the shipped models share: the loops, the files, the figures."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tfmq_fx.evaluation import digits, image_metrics

# (call, noisy images, timesteps, rows of the images, generator) to the model's answer.
Predict = Callable[[Any, Tensor, Tensor, Tensor, torch.Generator], Tensor]


def arguments(
    description: str, *, parts: Sequence[str], checkpoint: str
) -> argparse.ArgumentParser:
    """The options of a training script; `parts` is what --only calls its denoisers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--only",
        choices=("classifier", *parts, "evaluate"),
        required=len(parts) > 1,
        help="one part",
    )
    parser.add_argument("--assets", type=Path, default=digits.ASSETS)
    parser.add_argument("--checkpoint", type=Path, default=Path(checkpoint))
    parser.add_argument("--epochs", type=int, default=60, help="of the classifier")
    parser.add_argument("--iterations", type=int, default=9000, help="of the denoiser")
    parser.add_argument("--minutes", type=float, default=math.inf, help="limit for the denoiser")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200, help="iterations")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--samples", type=int, default=2000, help="drawn to evaluate")
    parser.add_argument("--inference-steps", type=int, default=20)
    parser.add_argument("--grid", type=Path, help="PNG of the first 64 samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    return parser


@torch.no_grad()
def logits_and_features(model: digits.ImageClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, 10) and features (n, 64) of images, computed in eval mode, 500 at a time."""
    model.eval()
    features = torch.cat([model.features(part) for part in images.split(500)])
    return model.head(F.silu(features)), features


def accuracy(model: digits.ImageClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label."""
    logits, _ = logits_and_features(model, images)
    return float((logits.argmax(1) == labels).float().mean())


def train_classifier(
    make: Callable[[], digits.ImageClassifier],
    train: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor],
    *,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    epochs: int,
    batch_size: int,
    seed: int,
) -> digits.ImageClassifier:
    """A classifier after `epochs` over the images and labels of `train`, in eval mode.

    augment(images, generator) returns what is trained on in place of a batch.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = train
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batches = math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in tqdm(range(epochs), desc="classifier", mininterval=10):
        model.train()
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            loss = F.cross_entropy(model(augment(images[rows], generator)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    print(
        f"classifier accuracy: train {accuracy(model, images, labels):.4f}, "
        f"held out {accuracy(model, *heldout):.4f}",
        flush=True,
    )
    return model.eval()


def save_classifier(model: digits.ImageClassifier, path: Path) -> None:
    """Write the classifier's weights; the file at `path` is replaced only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    os.replace(temporary, path)


def save_denoiser(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write `model` with `weights` in fp16 as a diffusers folder, replaced only when complete."""
    model.load_state_dict(weights)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.half().save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def learning_rate(progress: float, iteration: int, *, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` iterations, then half a cosine down to 1% of `peak`."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (iteration + 1) / warmup) * cosine


def train_denoiser(
    model: torch.nn.Module,
    scheduler: Any,
    images: Tensor,
    predict: Predict,
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """Averaged weights of `model` trained to predict, for images (n, c, h, w), what `scheduler`
    asks for: the noise or the velocity.
    """
    generator = torch.Generator().manual_seed(args.seed)
    alpha_bar = scheduler.alphas_cumprod
    steps = len(alpha_bar)
    velocity = scheduler.config.prediction_type == "v_prediction"

    model.train()
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    iteration, spent = 0, 0.0
    if args.checkpoint.exists():
        saved: dict[str, Any] = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        average, iteration, spent = saved["average"], saved["iteration"], saved["spent"]
        print(f"continuing from iteration {iteration}, {spent / 60:.1f} minutes", flush=True)

    call = torch.compile(model) if args.compile else model
    budget = args.minutes * 60
    first = iteration
    started = time.monotonic() - spent
    running, saved_at = float("nan"), spent
    bar = tqdm(total=args.iterations, initial=iteration, desc="denoiser", mininterval=15)
    while iteration < args.iterations and spent < budget:
        progress = max(iteration / args.iterations, spent / budget)
        rate = learning_rate(progress, iteration, peak=args.lr, warmup=args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate

        rows = torch.randint(0, len(images), (args.batch_size,), generator=generator)
        clean = images[rows]
        noise = torch.randn(clean.shape, generator=generator)
        # Evenly spaced timesteps with one random offset: the same mean loss, less variance.
        spaced = torch.arange(args.batch_size) + torch.rand(1, generator=generator)
        t = (spaced * (steps / args.batch_size)).long().clamp_(max=steps - 1)
        keep = alpha_bar[t].view(-1, 1, 1, 1)
        noisy = keep.sqrt() * clean + (1 - keep).sqrt() * noise
        target = keep.sqrt() * noise - (1 - keep).sqrt() * clean if velocity else noise
        if args.channels_last:
            noisy = noisy.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            predicted = predict(call, noisy, t, rows, generator)
        loss = F.mse_loss(predicted.float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        iteration += 1
        decay = min(args.ema, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            state = model.state_dict()
            torch._foreach_lerp_(list(average.values()), list(state.values()), 1 - decay)
        running = loss.item() if math.isnan(running) else 0.99 * running + 0.01 * loss.item()
        spent = time.monotonic() - started
        bar.update()
        bar.set_postfix(loss=f"{running:.4f}", lr=f"{rate:.1e}", refresh=False)
        if spent - saved_at > args.save_every or iteration == args.iterations or spent >= budget:
            saved_at = spent
            temporary = args.checkpoint.with_name(args.checkpoint.name + ".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "average": average,
                    "iteration": iteration,
                    "spent": spent,
                },
                temporary,
            )
            os.replace(temporary, args.checkpoint)
    bar.close()
    print(
        f"denoiser: {iteration} iterations ({iteration - first} in this run), "
        f"{spent / 60:.1f} minutes, smoothed loss {running:.4f}",
        flush=True,
    )
    return average


def nearest(images: Tensor, others: Tensor) -> float:
    """Median over images of the root mean square distance per pixel to the nearest other image."""
    distances = torch.cdist(images.flatten(1), others.flatten(1)).amin(1)
    return float(distances.median()) / math.sqrt(images[0].numel())


def quality(
    model: digits.ImageClassifier, drawn: Tensor, train: Tensor, heldout: Tensor, *, seed: int
) -> dict[str, Any]:
    """Frechet distances of drawn and of held-out images to train, with anchors and confidence.

    All (n, c, h, w). Intervals and random anchors come from `seed`.
    """
    _, real = logits_and_features(model, train)
    logits, generated = logits_and_features(model, drawn)
    heldout_logits, unseen = logits_and_features(model, heldout)
    generator = torch.Generator().manual_seed(seed)
    same_size = len(heldout)
    subset = real[torch.randperm(len(real), generator=generator)[:same_size]]
    noise = torch.randn(drawn.shape, generator=generator).clamp(-1, 1)
    _, blank = logits_and_features(model, noise)
    return {
        "fid": image_metrics.frechet_distance(generated, real),
        "fid_interval": image_metrics.bootstrap_interval(generated, real, generator=generator),
        f"fid_of_{same_size}": image_metrics.frechet_distance(generated[:same_size], real),
        "fid_heldout": image_metrics.frechet_distance(unseen, real),
        f"fid_{same_size}_of_train": image_metrics.frechet_distance(subset, real),
        "fid_noise": image_metrics.frechet_distance(blank, real),
        "confident": image_metrics.confident_share(logits),
        "confident_heldout": image_metrics.confident_share(heldout_logits),
        "classes": logits.argmax(1).bincount(minlength=digits.CLASSES).tolist(),
        "nearest_train": nearest(drawn, train),
        "nearest_train_heldout": nearest(heldout, train),
    }


def save_grid(images: Tensor, path: Path, *, zoom: int) -> None:
    """Write the first 64 images (n, 1 or 3, h, w) as a PNG of 8 by 8, enlarged `zoom` times."""
    from PIL import Image

    tiles = F.pad(images[:64], (1, 1, 1, 1), value=1.0)
    _, channels, height, width = tiles.shape
    sheet = tiles.reshape(8, 8, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = ((sheet.reshape(8 * height, 8 * width, channels) + 1) * 127.5).round()
    picture = Image.fromarray(pixels.to(torch.uint8).squeeze(2).numpy())
    larger = (8 * width * zoom, 8 * height * zoom)
    picture.resize(larger, Image.Resampling.NEAREST).save(path)
