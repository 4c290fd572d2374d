"""Train the classifier and the denoiser of `tfmq_fx.digits` and write them as package assets.

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
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tfmq_fx import digits, metrics

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


@torch.no_grad()
def accuracy(model: digits.DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def train_classifier(*, epochs: int, batch_size: int, seed: int) -> digits.DigitClassifier:
    """The classifier after `epochs` over the train split, in eval mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits.load_images("train")
    heldout = digits.load_images("heldout")
    model = digits.DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batches = math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in tqdm(range(epochs), desc="classifier", mininterval=10):
        model.train()
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            loss = F.cross_entropy(model(shifted(images[rows], generator)), labels[rows])
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


def save_classifier(model: digits.DigitClassifier, path: Path) -> None:
    """Write the classifier's weights; the file at `path` is replaced only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    os.replace(temporary, path)


def save_unet(weights: dict[str, Tensor], folder: Path) -> None:
    """Write the denoiser in fp16 as a diffusers folder, replaced only when complete."""
    from diffusers import UNet2DModel

    model = UNet2DModel(**UNET)
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


def train_unet(args: argparse.Namespace) -> tuple[dict[str, Tensor], int, float]:
    """Averaged weights of the trained denoiser, the iterations done, and the minutes they took."""
    from diffusers import UNet2DModel

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, _ = digits.load_images("train")
    alpha_bar = digits.make_scheduler().alphas_cumprod
    steps = digits.TRAINING_STEPS

    model = UNet2DModel(**UNET).train()
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
        if args.channels_last:
            noisy = noisy.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            predicted = call(noisy, t).sample
        loss = F.mse_loss(predicted.float(), noise)
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
    return average, iteration, spent / 60


def nearest(images: Tensor, others: Tensor) -> float:
    """Median over images of the root mean square distance per pixel to the nearest other image."""
    distances = torch.cdist(images.flatten(1), others.flatten(1)).amin(1)
    return float(distances.median()) / math.sqrt(images[0].numel())


def evaluate(*, count: int, inference_steps: int, seed: int, grid: Path | None) -> dict[str, Any]:
    """Figures of the shipped models: Frechet distances, confidence, and distance to training."""
    train, _ = digits.load_images("train")
    heldout, labels = digits.load_images("heldout")
    model = digits.load_classifier()
    drawn = metrics.sample(
        digits.load_unet(),
        digits.make_scheduler(),
        (count, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
        num_inference_steps=inference_steps,
        seed=seed,
        progress=True,
    )
    if grid is not None:
        save_grid(drawn[:64], grid)
    with torch.no_grad():
        real = model.features(train)
        generated = model.features(drawn)
        unseen = model.features(heldout)
        logits, heldout_logits = model(drawn), model(heldout)
    generator = torch.Generator().manual_seed(seed)
    same_size = len(heldout)
    subset = real[torch.randperm(len(real), generator=generator)[:same_size]]
    blank = model.features(torch.randn(drawn.shape, generator=generator).clamp(-1, 1)).detach()
    return {
        "torch": torch.__version__,
        "samples": count,
        "inference_steps": inference_steps,
        "seed": seed,
        "fid": metrics.frechet_distance(generated, real),
        "fid_interval": metrics.bootstrap_interval(generated, real, generator=generator),
        f"fid_of_{same_size}": metrics.frechet_distance(generated[:same_size], real),
        "fid_heldout": metrics.frechet_distance(unseen, real),
        f"fid_{same_size}_of_train": metrics.frechet_distance(subset, real),
        "fid_noise": metrics.frechet_distance(blank, real),
        "confident": metrics.confident_share(logits),
        "confident_heldout": metrics.confident_share(heldout_logits),
        "accuracy_heldout": accuracy(model, heldout, labels),
        "classes": logits.argmax(1).bincount(minlength=digits.CLASSES).tolist(),
        "nearest_train": nearest(drawn, train),
        "nearest_train_heldout": nearest(heldout, train),
    }


def save_grid(images: Tensor, path: Path) -> None:
    """Write 64 images (64, 1, 16, 16) as a PNG of 8 by 8, four pixels to each of theirs."""
    from PIL import Image

    tiles = F.pad(images[:64], (1, 1, 1, 1), value=1.0).reshape(8, 8, 18, 18).transpose(1, 2)
    pixels = ((tiles.reshape(144, 144) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).resize((576, 576), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Train what the arguments ask for and write the assets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("classifier", "unet", "evaluate"), help="one part")
    parser.add_argument("--assets", type=Path, default=digits.ASSETS)
    parser.add_argument("--checkpoint", type=Path, default=Path("digits-unet.ckpt"))
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
    args = parser.parse_args()

    if args.only in (None, "classifier"):
        model = train_classifier(epochs=args.epochs, batch_size=64, seed=args.seed)
        save_classifier(model, args.assets / digits.CLASSIFIER_FILE.name)
    if args.only in (None, "unet"):
        average, _, _ = train_unet(args)
        save_unet(average, args.assets / digits.UNET_FOLDER.name)
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
