"""Memory that quantizing takes above the loaded model: peak RSS of a process of its own.

    python -m tests.bench.bench_memory                the digits model, W4A8
    python -m tests.bench.bench_memory --cifar10      the CIFAR-10 DDPM UNet, random weights

The bound: 3 x (float weights + activations of one batch) + the Gram matrices of the widest layer.
The start is taken when the same has been done to a tiny model, so that code that is loaded on first
use does not count. Activations of one batch: what is alive at once, at most, in one full-precision
call of that batch.
One JSON line at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tfmq_fx
from tests.bench.bench_cpu import cifar10
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.core.config import Config
from tfmq_fx.core.presets import PRESETS
from tfmq_fx.evaluation import digits
from tfmq_fx.evaluation.benchmark import STEPS
from tfmq_fx.quant.quant_layer import QuantLayer

MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Peak:
    """The most bytes in memory since it was made, sampled every 2 ms."""

    def __init__(self) -> None:
        self.start = self.most = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, resident())

    def stop(self) -> int:
        """Bytes above the start."""
        self._done.set()
        self._thread.join()
        return max(self.most, resident()) - self.start


def tiny() -> nn.Module:
    """A denoiser of the same kind with next to no weights."""
    from diffusers import UNet2DModel

    model: nn.Module = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return model.eval()


def alive(prepared: tfmq_fx.Prepared, batch: tuple[torch.Tensor, ...]) -> int:
    """Bytes of activations alive at once in one call, at most; storages count once."""
    walk, most = LayerwiseExecutor(prepared.gm, [batch]), 0
    weights = {p.untyped_storage().data_ptr() for p in prepared.gm.parameters()}
    for _ in prepared.gm.graph.nodes:
        walk.step()
        tensors = [h[0] for h in walk.values.values() if isinstance(h[0], torch.Tensor)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        most = max(most, sum(n for address, n in held.items() if address not in weights))
    return most


def measure(model: nn.Module, shape: tuple[int, ...], config: Config, steps: int) -> dict[str, Any]:
    """Peak and bound of prepare, calibrate and convert, and seconds of each."""
    spec = config.reconstruction
    peak, start = Peak(), time.perf_counter()
    prepared = tfmq_fx.prepare(model, config=config)
    tfmq_fx.calibrate(
        prepared,
        (digits.make_scheduler(), shape),
        num_inference_steps=steps,
        samples=spec.batch_size,
        batch_size=spec.batch_size,
        progress=False,
    )
    calibrated, until = max(peak.most, resident()) - peak.start, time.perf_counter()
    converted = tfmq_fx.convert(prepared, progress=False)
    most, end = peak.stop(), time.perf_counter()
    batch = prepared.cache.chunks(
        spec.batch_size, batched=prepared.batched(), batch_size=spec.batch_size, seed=0
    )[0]
    layers = [m for m in converted.gm.modules() if isinstance(m, QuantLayer)]
    widest = max(torch.Size(m.weight_shape[1:]).numel() for m in layers)
    weights = sum(p.nbytes for p in model.parameters())
    activations, gram = alive(prepared, batch), widest**2 * 8
    bound = 3 * (weights + activations) + 2 * gram
    return {
        "peak_mib": round(most / MIB, 1),
        "peak_of_calibration_mib": round(calibrated / MIB, 1),
        "weights_mib": round(weights / MIB, 1),
        "activations_mib": round(activations / MIB, 1),
        "gram_mib": round(gram / MIB, 1),
        "bound_mib": round(bound / MIB, 1),
        "ratio": round(most / bound, 2),
        "times_weights_and_activations": round((most - 2 * gram) / (weights + activations), 2),
        "memory_mib": round(spec.memory / MIB, 1),
        "samples": min(spec.samples, len(prepared.cache)),
        "seconds": round(until - start, 1),
        "convert_seconds": round(end - until, 1),
    }


def main() -> None:
    """Measure in a fresh process and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar10", action="store_true")
    parser.add_argument("--memory", type=int, help="bytes of activations held in memory")
    parser.add_argument("--iters", type=int, default=0, help="Adam steps of AdaRound")
    parser.add_argument("--samples", type=int, help="calibration samples used")
    parser.add_argument("--steps", type=int, help="steps of the sampler")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.here:
        command = [sys.executable, "-m", "tests.bench.bench_memory", "--here", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    torch.set_num_threads(args.threads)
    config = PRESETS["w4a8"]
    changes = {"memory": args.memory, "samples": args.samples, "iters": args.iters}
    spec = dataclasses.replace(
        config.reconstruction, **{k: v for k, v in changes.items() if v is not None}
    )
    config = dataclasses.replace(config, reconstruction=spec)
    if args.cifar10:
        model, shape, steps = cifar10(), (3, 32, 32), args.steps or 20
    else:
        model, shape = digits.load_unet(), (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
        steps = args.steps or STEPS
    small = dataclasses.replace(spec, batch_size=2, samples=2)
    measure(tiny(), (3, 16, 16), dataclasses.replace(config, reconstruction=small), 2)
    found = measure(model, shape, config, steps)
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")
    what = {"bench": "memory", "model": "cifar10" if args.cifar10 else "digits"}
    print(json.dumps(what | {"torch": torch.__version__, "threads": args.threads} | found))


if __name__ == "__main__":
    main()
