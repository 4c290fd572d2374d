"""Bytes that a model keeps on a CUDA device, counted without one: of bf16 and of lowered models.

    python -m tests.bench.bench_bytes sd15 dit-xl-2      full width, random weights

Layers are quantized and lowered as for a device of compute capability 9.0 on which no kernel loses
to floating point. Weights do not depend on the size of images: those here are small.
"""

from __future__ import annotations

import argparse
import time

import torch

import tfmq_fx
from tests.bench.cuda_models import Case, Request, build, calibrated, recipe, tensor_bytes
from tfmq_fx.backends.cuda.autotune import untimed_choice
from tfmq_fx.backends.cuda.lower import lower

PRESETS = ("w8a8", "fp8", "w4a8")
HOPPER = (9, 0)
SIDE = 16  # of the latent image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entries", nargs="+", metavar="ENTRY", help="of tests.zoo: sd15, sdxl, ...")
    parser.add_argument("--presets", default=",".join(PRESETS), help="with commas between")
    args = parser.parse_args()
    print(f"{'model':12} {'':8} {'MiB':>8} {'x bf16':>7} {'layers':>7} {'in float':>9}")
    for entry in args.entries:
        case = Case(entry=entry, batch=1, tokens=8, changed={"sample_size": SIDE})
        model = build(case, "cpu")
        whole = tensor_bytes(model)
        print(f"{entry:12} {'bf16':8} {whole / 2**20:8.1f} {1:7.3f}")
        prepared = calibrated(case, model, Request(case, model))
        for preset in args.presets.split(","):
            start = time.perf_counter()
            prepared.recipe = recipe(preset, tables=True)
            made = tfmq_fx.convert(prepared, progress=False)
            with torch.no_grad():
                lowered = lower(made.gm, choose=untimed_choice, capability=HOPPER)
            size, count = tensor_bytes(lowered.gm), lowered.details["integer"]
            print(
                f"{entry:12} {preset:8} {size / 2**20:8.1f} {size / whole:7.3f} {count:7} "
                f"{len(lowered.declined):9}   {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            del made, lowered


if __name__ == "__main__":
    main()
