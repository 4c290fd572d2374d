"""Denoisers that are timed on the CPU, their inputs, and how this package quantizes them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tfmq_fx
from tests.bench.cuda_models import Case, Inputs, Request, build, timesteps, tiny

WIDE_DIT = {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}
SHORT_FLUX = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 8}
CASES = {
    "cifar10-b4": Case(entry="ddpm-cifar10", batch=4),
    "cifar10-b1": Case(entry="ddpm-cifar10", batch=1),
    "dit-b2": Case(entry="dit-xl-2", batch=2, changed=WIDE_DIT),
    "flux-b1": Case(entry="flux-dev", batch=1, tokens=64, changed=SHORT_FLUX, flow=True),
    "sd15-b2": Case(entry="sd15", batch=2, changed={"sample_size": 32}),
    "sd15-b1": Case(entry="sd15", batch=1, changed={"sample_size": 32}),
    "sd15-512-b2": Case(entry="sd15", batch=2),
}
"""DDPM on CIFAR-10 with diffusers' heads of 8 channels; DiT-B/2 for 256 pixels; FLUX cut down to 6
of 57 blocks and 8 of 24 heads, 256 image and 64 text tokens; Stable Diffusion 1.5 at 256 and 512
pixels."""
TOGETHER = {"sd15-b2": 2, "sd15-b1": 2, "sd15-512-b2": 2}
"""Variants held in memory at once beside the baselines, where not all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every variant of a model is made from.

    evaluation, calibration: one batch for each timestep, from different seeds.  folder: of the run.
    recipe: "nearest" or "full".
    """

    model: nn.Module
    evaluation: list[Inputs]
    calibration: list[Inputs]
    timesteps: Tensor
    threads: int
    recipe: str
    folder: Path
    tiny: bool


@dataclass(kw_only=True)
class Made:
    """A variant that can be called.

    call: inputs -> output.  saved: bytes on disk of what a user would keep.  note: one line.
    seconds: spent on what a saved model does not need again.  peak: bytes in memory meanwhile, if
    another process did it.  since: when, by time.perf_counter, the rest began.  coverage: shares
    of weights and of layer inputs that are integers.  kernels: counts integer kernels by name after
    the first call, where torch's profiler cannot.
    """

    call: Callable[[Inputs], Tensor]
    saved: int
    note: str = ""
    seconds: float = 0.0
    peak: int = 0
    since: float = field(default_factory=time.perf_counter)
    coverage: list[float] = field(default_factory=list)
    kernels: Callable[[], dict[str, int]] | None = None


def cifar10(*, small: bool = False) -> nn.Module:
    """The denoiser of DDPM on CIFAR-10 (35.7M parameters), random weights.

    small: a quarter as wide, and the levels with attention and the one above it alone.
    """
    from diffusers import UNet2DModel

    down, up = ["DownBlock2D", "AttnDownBlock2D"], ["AttnUpBlock2D", "UpBlock2D"]
    if not small:
        down, up = [*down, "DownBlock2D", "DownBlock2D"], ["UpBlock2D", "UpBlock2D", *up]
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1 if small else 2,
        block_out_channels=(32, 64) if small else (128, 256, 256, 256),
        down_block_types=down,
        up_block_types=up,
    ).eval()


def job(
    name: str, *, seed: int, steps: int, threads: int, recipe: str, folder: Path, small: bool
) -> Job:
    """The model `name` and its inputs; equal arguments give equal weights and inputs."""
    case = tiny(CASES[name]) if small else CASES[name]
    if name.startswith("cifar10"):
        model = cifar10(small=small)
    else:
        model = build(case, "cpu", full=not small, dtype=torch.float32)
        model = model.to(memory_format=torch.contiguous_format)
    model.requires_grad_(False)

    def drawn(own: int) -> list[Inputs]:
        request = Request(case, model, own, steps)
        return [_contiguous(request.inputs(step)) for step in range(steps)]

    return Job(
        model=model,
        evaluation=drawn(2 * seed),
        calibration=drawn(2 * seed + 1),
        timesteps=timesteps(case, steps),
        threads=threads,
        recipe=recipe,
        folder=folder,
        tiny=small,
    )


def _contiguous(given: Inputs) -> Inputs:
    return {key: v.contiguous() if isinstance(v, Tensor) else v for key, v in given.items()}


def first(answer: Any) -> Tensor:
    """The tensor that a denoiser answers, or the first of what it answers."""
    found: Tensor = answer if isinstance(answer, Tensor) else answer[0]
    return found


def nearest(config: tfmq_fx.Config) -> tfmq_fx.Config:
    """The recipe with nearest rounding: random weights gain nothing from anything better."""
    rounding = dataclasses.replace(config.reconstruction, rounding="nearest")
    temporal = dataclasses.replace(config.temporal, mode="table")
    return dataclasses.replace(config, reconstruction=rounding, temporal=temporal)


class Positional(nn.Module):
    """A denoiser called by position, answering with one tensor."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return first(self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False))


def exported(job: Job) -> torch.export.ExportedProgram:
    """The model as torch.export has it, at the sizes of its inputs."""
    given = job.evaluation[0]
    with torch.no_grad():
        return torch.export.export(Positional(job.model, [*given]).eval(), tuple(given.values()))
