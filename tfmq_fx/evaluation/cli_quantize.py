"""`tfmq-fx quantize`: quantize the denoisers of a pipeline's directory."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tfmq_fx.core.errors import ConfigError

from .cli_options import Commands, add_call, answer, call_of, command, set_run

EXAMPLES = """\
  tfmq-fx quantize stable-diffusion out --config w4a8 --steps 20
  tfmq-fx quantize sdxl out --budget 0.3x --prompts prompts.txt --checkpoint saved
  tfmq-fx quantize inpainting out --image photo.png --mask mask.png --set strength=0.9
"""


def add(commands: Commands) -> None:
    """Add the command."""
    what = "quantize the denoisers of a diffusers pipeline, from a directory to a directory"
    parser = command(commands, "quantize", what, EXAMPLES)
    add = parser.add_argument
    add("pipeline", metavar="DIR", type=Path, help="directory that pipe.save_pretrained wrote")
    add("out", metavar="OUT", type=Path, help="directory to write, a pipeline of the same form")
    add("--config", default="w8a8", help="preset or recipe: w8a8, w4a8, best-w4a6, ... (w8a8)")
    add("--steps", type=int, default=20, help="sampling steps, which the result is made for (20)")
    text = "file with a prompt in each line, or a JSON list (eight built-in prompts)"
    add("--prompts", metavar="FILE", type=Path, help=text)
    add("--guidance", type=float, help="guidance scale (the pipeline's)")
    add("--budget", help="bits are chosen within it: 0.3x, 900MiB, '0.5x time'")
    text = "directory for finished layers, from which an interrupted run goes on"
    add("--checkpoint", metavar="DIR", type=Path, help=text)
    text = "denoiser to quantize, where there are several (all)"
    add("--component", metavar="NAME", action="append", help=text)
    add("--samples", type=int, help="of pipelines without prompts or labels (64)")
    add("--batch-size", type=int, help="samples at a time (2; 32 without prompts or labels)")
    add("--seed", type=int, default=0, help="of sampling (0)")
    add("--bind", action="store_true", help="bind the results to requests (docs/requests.md)")
    add("--device", help="where to compute, as cuda (the CPU)")
    add_call(parser)
    set_run(parser, run)


def run(chosen: argparse.Namespace) -> int:
    """Quantize, write, and print what was done."""
    from tfmq_fx.pipelines.pipeline_folder import check_writable, load_pipeline, write_pipeline
    from tfmq_fx.pipelines.quantize_pipeline import quantize_pipeline

    out = chosen.out.resolve()
    source = chosen.pipeline.resolve()
    if out == source or source in out.parents or out in source.parents:
        raise ConfigError(f"OUT {chosen.out} must lie outside of DIR {chosen.pipeline}")
    check_writable(out)
    prompts = None if chosen.prompts is None else read_prompts(chosen.prompts)
    call = call_of(chosen)
    begun = time.perf_counter()
    pipeline = load_pipeline(chosen.pipeline, chosen.device)
    report = quantize_pipeline(
        pipeline,
        chosen.config,
        prompts=prompts,
        steps=chosen.steps,
        samples=chosen.samples,
        batch_size=chosen.batch_size,
        seed=chosen.seed,
        component=chosen.component,
        budget=chosen.budget,
        checkpoint=chosen.checkpoint,
        bind=chosen.bind,
        progress=not chosen.quiet,
        **call,
    )
    write_pipeline(report, out)
    facts: dict[str, Any] = {
        "out": str(chosen.out),
        "pipeline": type(pipeline).__name__,
        "config": chosen.config,
        "steps": chosen.steps,
        "seconds": round(time.perf_counter() - begun, 1),
        "denoisers": {
            name: {
                "bytes": part.data["bytes"],
                "float_bytes": part.data["float_bytes"],
                "layers": len(part.data["sites"]),
                "weight_coverage": part.weight_coverage,
                "activation_coverage": part.activation_coverage,
                "timesteps": part.data["timesteps"],
            }
            for name, part in report.reports.items()
        },
    }
    answer(chosen, facts, _text(facts))
    return 0


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a JSON list of texts, or one in each line that is not empty.

    Raises ConfigError where it cannot be read or has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {path} cannot be read as text: {error}") from error
    prompts: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix == ".json":
        try:
            prompts = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--prompts {path} is not JSON: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        raise ConfigError(f"--prompts {path} must be a JSON list of texts")
    if not prompts:
        raise ConfigError(f"--prompts {path} has no prompts: write one in each line")
    return prompts


def _text(facts: dict[str, Any]) -> str:
    lines = []
    for name, part in facts["denoisers"].items():
        lines.append(
            f"{name}: {part['bytes'] / 2**20:.1f} MiB of {part['float_bytes'] / 2**20:.1f} "
            f"({part['float_bytes'] / max(part['bytes'], 1):.2f}x smaller), "
            f"{100 * part['weight_coverage']:.1f} % of weights and "
            f"{100 * part['activation_coverage']:.1f} % of layer inputs quantized"
        )
    lines.append(f"written to {facts['out']} in {facts['seconds']} s")
    lines.append(f"draw with it: tfmq-fx sample {facts['out']} --out picture.png")
    return "\n".join(lines)
