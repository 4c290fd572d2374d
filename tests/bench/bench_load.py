"""Time and peak memory of loading a saved model, in a process of its own.

    python -m tests.bench.bench_load FOLDER           a model that `save` wrote
    python -m tests.bench.bench_load --make FOLDER    writes Stable Diffusion's UNet first, with 860
                                                      million random weights, as W4A8 (minutes)

The peak is that of the process, less what it holds once tfmq_fx has loaded a tiny model.
Bytes are those of the folder's graph and tensors, which running reads. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tfmq_fx
from tests.toys import ToyUNet, seeded
from tfmq_fx.core.presets import PRESETS
from tfmq_fx.serialization.artifact import saved_bytes

CONFIG = Path(__file__).parents[1] / "configs" / "sd15.json"
MIB = 2**20


def make(folder: Path) -> None:
    """Write the UNet of Stable Diffusion 1.5 with random weights, as W4A8 rounded to nearest."""
    import diffusers

    config = {**json.loads(CONFIG.read_text()), "sample_size": 8}  # its weights are the same
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    unet = unet.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.uniform_(-0.02, 0.02)
    recipe: Any = PRESETS["w8a8-dynamic"]
    weights = dataclasses.replace(recipe.layers.weights, bits=4, search=1)  # what is quick
    layers = dataclasses.replace(recipe.layers, weights=weights)
    temporal = dataclasses.replace(recipe.temporal, mode="table")
    recipe = dataclasses.replace(recipe, layers=layers, temporal=temporal)
    prepared = tfmq_fx.prepare(unet, config=recipe, timesteps=[1, 500])
    tfmq_fx.save(tfmq_fx.convert(prepared), folder)


def peak() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path) -> dict[str, Any]:
    """Load `folder` in this process."""
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1])
    with tempfile.TemporaryDirectory() as small:
        tfmq_fx.save(tfmq_fx.fold_timesteps(seeded(ToyUNet).eval(), 2, (x, t)), Path(small, "toy"))
        tfmq_fx.load(Path(small, "toy"))
    before, begun = peak(), time.perf_counter()
    model = tfmq_fx.load(folder)
    seconds = time.perf_counter() - begun
    return {
        "seconds": round(seconds, 2),
        "peak_mib": round((peak() - before) / MIB, 1),
        "file_mib": round(saved_bytes(folder) / MIB, 1),
        "peak_per_file": round((peak() - before) / saved_bytes(folder), 3),
        "tensors": sum(1 for _ in model.tensors()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.folder)))
        return
    if args.make:
        make(args.folder)
    command = [sys.executable, "-m", "tests.bench.bench_load", str(args.folder), "--here"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(json.loads(done.stdout.splitlines()[-1]) | facts))


if __name__ == "__main__":
    main()
