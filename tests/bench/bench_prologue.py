"""A whole request on the CPU with and without a prologue: time, and bytes that a step still reads.

    python -m tests.bench.bench_prologue                     DiT, SD3.5 and FLUX at reduced width
    python -m tests.bench.bench_prologue --model dit --config w8a8
    python -m tests.bench.bench_prologue --full               what leaves models of full size (fp16)

Random weights. A request is --steps steps with conditions it has not seen before, so that computing
the prologue is part of its time. Requests of all variants are interleaved; medians with the range
of the middle half; one JSON line at the end. Baselines: torch.compile of the model, and this
package's compiled graph without a prologue.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tfmq_fx
from tests.bench.bench_cpu import interleaved, nearest
from tfmq_fx.capture.capture import capture
from tfmq_fx.capture.inputs import find_timestep, named_inputs
from tfmq_fx.diagnostics.meta_model import meta_model
from tfmq_fx.passes.merge_duplicates import merge_duplicates
from tfmq_fx.passes.split_prologue import split_prologue
from tfmq_fx.prologue.weight_offload import give_back

CONFIGS = Path(__file__).parents[1] / "configs"
REDUCED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        "dit-xl-2",
        {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    ),
    "sd35": (
        "SD3Transformer2DModel",
        "sd35-medium",
        {
            "num_layers": 8,
            "num_attention_heads": 8,
            "attention_head_dim": 64,
            "caption_projection_dim": 512,
            "joint_attention_dim": 1024,
            "pooled_projection_dim": 512,
            "sample_size": 32,
            "pos_embed_max_size": 32,
            "dual_attention_layers": [0, 1, 2],
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        "flux-dev",
        {
            "num_layers": 3,
            "num_single_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 128,
            "joint_attention_dim": 1024,
            "pooled_projection_dim": 256,
        },
    ),
}
"""name -> class of diffusers, published configuration, what is reduced."""


def build(name: str) -> nn.Module:
    """The reduced model with random weights, none of them zero."""
    import diffusers

    kind, config, reduced = REDUCED[name]
    made = getattr(diffusers, kind)
    torch.manual_seed(0)
    model: nn.Module = made.from_config(
        json.loads((CONFIGS / f"{config}.json").read_text()) | reduced
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.02)
    return model.eval()


def request(name: str, model: nn.Module, batch: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A sample and conditions, by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    config: Any = model.config
    if name == "dit":
        labels = torch.randint(0, 1000, (batch,), generator=generator)
        return drawn(config.in_channels, 32, 32), {"class_labels": labels}
    if name == "sd35":
        text = drawn(77, config.joint_attention_dim)
        pooled = drawn(config.pooled_projection_dim)
        return drawn(config.in_channels, 32, 32), {
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
        }
    text = drawn(77, config.joint_attention_dim)
    ids = torch.stack(
        [torch.zeros(256), torch.arange(256.0) // 16, torch.arange(256.0) % 16], dim=1
    )
    return drawn(256, config.in_channels), {
        "encoder_hidden_states": text,
        "pooled_projections": drawn(config.pooled_projection_dim),
        "img_ids": ids,
        "txt_ids": torch.zeros(77, 3),
        "guidance": torch.rand(batch, generator=generator) * 5,
    }


def times_of(name: str, steps: int) -> list[Tensor]:
    """The timesteps of a request, (1,) each, as the model receives them."""
    spread = torch.linspace(1, 1 / steps, steps)
    if name == "dit":
        return list((999 * spread).long().split(1))
    return list((spread if name == "flux" else 1000 * spread).split(1))


@torch.no_grad()
def sample(
    call: Callable[..., Any], x: Tensor, times: list[Tensor], given: dict[str, Tensor]
) -> Tensor:
    """A crude Euler sampler: what is timed is the denoiser."""
    for t in times:
        out = call(x, timestep=t.expand(len(x)), return_dict=False, **given)[0]
        x = x - 0.05 * out[:, : x.shape[1]]
    return x


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant."""
    model = build(name)
    times = times_of(name, args.steps)
    seeds = iter(range(10**6))
    first = "hidden_states"
    x, given = request(name, model, 2, next(seeds))
    example = {first: x, "timestep": times[0].expand(2), **given}
    if args.config == "fp":
        plain = tfmq_fx.bind_request(model, None, example).unbound()
    else:
        plain = quantized(model, name, example, times, args)
    bound = tfmq_fx.bind_request(plain)
    reference = model if args.config == "fp" else plain
    x, given = request(name, model, args.batch, next(seeds))
    equal = all(
        torch.equal(
            *(
                m(x, timestep=t.expand(len(x)), return_dict=False, **given)[0]
                for m in (reference, bound)
            )
        )
        for t in times[:: max(1, len(times) // 4)]
    )
    bound.set_timesteps(torch.cat(times))
    runs: dict[str, Callable[..., Any]] = {
        "torch.compile of the model": torch.compile(model),
        "tfmq_fx, no prologue": tfmq_fx.compile(plain, "inductor"),
        "tfmq_fx, prologue": tfmq_fx.compile(bound, "inductor"),
    }

    def one(call: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            x, given = request(name, model, args.batch, next(seeds))
            return sample(call, x, times, given)

        return run

    found = interleaved({k: one(v) for k, v in runs.items()}, repeats=args.repeats, warmup=1)
    base = statistics.median(found["tfmq_fx, no prologue"])
    freed = bound.prologue.offloaded.nbytes()
    rows = []
    for variant, ms in found.items():
        low, _, high = statistics.quantiles(ms, n=4)
        rows.append(
            {
                "model": name,
                "name": variant,
                "seconds": round(statistics.median(ms) / 1000, 3),
                "middle_half": [round(low / 1000, 3), round(high / 1000, 3)],
                "ratio": round(base / statistics.median(ms), 3),
            }
        )
    step = sum(t.nbytes for t in {id(t): t for t in step_tensors(bound)}.values())
    rows[0] |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "equal": equal,
        "bytes": plain.nbytes(),
        "freed_bytes": freed,
        "step_bytes": step,
        "kept_bytes_of_one_request": bound.prologue.nbytes()
        // len(bound.prologue.parts[0].entries),
        "anonymous_freed": anonymous_freed(
            plain, times, lambda: request(name, model, args.batch, next(seeds))
        ),
    }
    return rows


def step_tensors(bound: tfmq_fx.Bound) -> list[Tensor]:
    """Parameters and buffers of the step's graph."""
    return [*bound.step.parameters(), *bound.step.buffers()]


def held() -> int:
    """Bytes that the system cannot take back: memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def anonymous_freed(plain: Any, times: list[Tensor], draw: Callable[[], Any]) -> int:
    """Bytes that leave the process when the prologue's weights go to disk after a request began.

    Of the file, whose pages the system may drop, looking for changes maps some, 2 MiB at once.
    """
    own = copy.deepcopy(plain)  # its tensors are nobody else's
    x, given = draw()

    def begin(offload: str) -> tfmq_fx.Bound:
        bound = tfmq_fx.bind_request(own, torch.cat(times), offload=offload)
        sample(bound, x, times[:1], given)
        gc.collect()
        give_back()  # what was freed otherwise is no merit of the one nor of the other
        return bound

    none = begin("none")
    before = held()
    del none
    away = begin("disk")
    assert away.prologue.offloaded.is_away
    return before - held()


def quantized(
    model: nn.Module,
    name: str,
    example: dict[str, Tensor],
    times: list[Tensor],
    args: argparse.Namespace,
) -> tfmq_fx.Converted:
    """The model under a preset with nearest rounding, calibrated on noise."""
    config = nearest(tfmq_fx.PRESETS[args.config])
    prepared = tfmq_fx.prepare(model, example, timesteps=torch.cat(times), config=config)
    for seed, t in enumerate(times):
        x, given = request(name, model, 2, 10**7 + seed)
        prepared(x, timestep=t.expand(2), return_dict=False, **given)
    return tfmq_fx.convert(prepared, progress=False)


FULL = ("dit-xl-2", "pixart-alpha-1024", "sd35-medium", "flux-dev", "sdxl", "adm", "hunyuan-dit")


def full(name: str, steps: int) -> str:
    """One row of what a prologue takes from a model of full size; no weights are made."""
    model = meta_model(CONFIGS / f"{name}.json").half()
    inputs = named_inputs(model, None)
    captured = capture(model, inputs, timestep=find_timestep(inputs, None))
    gm = merge_duplicates(captured.gm).gm
    split = split_prologue(gm, captured.call.conditions, steps=steps)
    every = sum(p.nbytes for p in model.parameters())
    freed = sum(t.nbytes for t in split.freed.values())
    step = sum(part.step_bytes for part in split.parts if part.stepped)
    once = sum(part.step_bytes for part in split.parts if not part.stepped)
    return (
        f"| {name} | {every / 2e6:.0f}M | {100 * freed / every:.1f} % | {freed / 2**20:.0f} MiB "
        f"| {step / 1024:.1f} | {once / 1024:.0f} | {len(split.declined)} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=REDUCED, nargs="+", default=list(REDUCED))
    parser.add_argument("--config", choices=("fp", "w8a8", "w4a8"), default="fp")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.full:
        print("| | parameters | leave | | KiB a step | KiB a request | declined |")
        print("|---|---|---|---|---|---|---|")
        for name in FULL:
            print(full(name, 50), flush=True)
        return
    rows = [row for name in args.model for row in measure(name, args)]
    print("| | seconds per request (middle half) | x no prologue |")
    print("|---|---|---|")
    for row in rows:
        low, high = row["middle_half"]
        figures = f"{row['seconds']} ({low} to {high}) | {row['ratio']}"
        print(f"| {row['model']}: {row['name']} | {figures} |")
    for row in rows:
        if "freed_bytes" in row:
            share = 100 * row["freed_bytes"] / row["bytes"]
            print(
                f"{row['model']}: {row['parameters'] / 1e6:.1f}M parameters, {share:.1f} % of the "
                f"bytes leave ({row['freed_bytes'] / 2**20:.1f} MiB; with offload='disk' anonymous "
                f"memory fell by {row['anonymous_freed'] / 2**20:.1f} MiB), values of a request "
                f"take {row['kept_bytes_of_one_request'] / 2**20:.2f} MiB, equal bit for bit in "
                f"eager: {row['equal']}"
            )
    print(
        json.dumps(
            {
                "bench": "prologue",
                "config": args.config,
                "batch": args.batch,
                "steps": args.steps,
                "threads": args.threads,
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
