"""`tfmq-fx bench`: time quantized denoisers against the compiled originals on this machine."""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tfmq_fx.core.arguments import check_whole
from tfmq_fx.core.errors import ConfigError

from .cli_options import Commands, add_call, answer, call_of, command, set_run, steps_of

EXAMPLES = """\
  tfmq-fx bench out --reference stable-diffusion
  tfmq-fx bench out --backend inductor --rounds 20 --json
"""


def add(commands: Commands) -> None:
    """Add the command."""
    what = "time the quantized denoisers of a directory against the compiled originals"
    parser = command(commands, "bench", what, EXAMPLES)
    parser.description = """\
Time one call of each quantized denoiser against torch.compile of the original in bfloat16 and in
float32 (frozen, channels last), in turn, in one process: medians, the middle half, and how many
times faster it is than the faster of the two. Without --reference the original is made from its
config with random weights, which run as fast; then nothing is said of errors."""
    add = parser.add_argument
    add("pipeline", metavar="DIR", type=Path, help="directory that `tfmq-fx quantize` wrote")
    add("--reference", metavar="DIR", type=Path, help="directory of the original pipeline")
    add("--rounds", type=int, default=10, help="calls of each that are timed (10)")
    add(
        "--backend",
        default="auto",
        help="auto (the fastest here), inductor, openvino, float, eager",
    )
    add("--prompt", metavar="TEXT", nargs="+", help="what it draws meanwhile (two built-in ones)")
    add("--guidance", type=float, help="guidance scale (the pipeline's)")
    add("--device", help="where to compute, as cuda (the CPU)")
    add_call(parser)
    set_run(parser, run)


def run(chosen: argparse.Namespace) -> int:
    """Time and print."""
    from tfmq_fx.conversion.models import Converted
    from tfmq_fx.pipelines.default_inputs import call_arguments, in_batches
    from tfmq_fx.pipelines.denoisers import denoisers
    from tfmq_fx.pipelines.pipeline_folder import load_pipeline
    from tfmq_fx.pipelines.record_inputs import record_inputs

    from .denoiser_times import denoiser_times, output_sqnr
    from .result_store import machine

    check_whole(chosen.rounds, "--rounds", 1)
    pipeline = load_pipeline(chosen.pipeline, chosen.device)
    models = {n: m for n, m in denoisers(pipeline).items() if isinstance(m, Converted)}
    if not models:
        raise ConfigError(
            f"{chosen.pipeline} has no quantized denoiser: make one with tfmq-fx quantize"
        )
    originals = _originals(chosen, models)
    for name, original in originals.items():
        setattr(pipeline, name, original)  # record_inputs looks at what is not quantized
    arguments, _ = in_batches(
        pipeline, call_arguments(pipeline, chosen.prompt, call_of(chosen)), None
    )
    results = {}
    for name, model in models.items():
        steps = {"num_inference_steps": steps} if (steps := steps_of(model)) else {}
        inputs = record_inputs(pipeline, component=name, **steps | arguments)
        rows, output = denoiser_times(
            model,
            originals[name],
            inputs,
            rounds=chosen.rounds,
            backend=chosen.backend,
            progress=not chosen.quiet,
        )
        best = min(row.median for row in rows[1:] if row.failed is None)
        quality = None
        if chosen.reference is not None:
            quality = output_sqnr(originals[name], inputs, output)
        results[name] = {
            "times": [asdict(row) for row in rows],
            "speedup": best / rows[0].median,
            "sqnr": quality,
            "sizes": {spec.path: list(spec.shape) for spec in model.call.inputs},
        }
    facts = {
        "reference": None if chosen.reference is None else str(chosen.reference),
        "rounds": chosen.rounds,
        **machine(chosen.device or "cpu"),
        "denoisers": results,
    }
    answer(chosen, facts, _text(facts))
    return 0


def _originals(chosen: argparse.Namespace, models: dict[str, Any]) -> dict[str, Any]:
    """The original of each model, of the reference's directory or of random weights."""
    import diffusers
    import torch

    from tfmq_fx.pipelines.pipeline_folder import load_pipeline

    if chosen.reference is not None:
        reference = load_pipeline(chosen.reference, chosen.device)
        found = {name: getattr(reference, name, None) for name in models}
        wrong = [n for n, m in found.items() if not isinstance(m, diffusers.ModelMixin)]
        if wrong:
            raise ConfigError(
                f"--reference {chosen.reference} has no {wrong[0]} of diffusers: give the "
                f"directory that {chosen.pipeline} was made from"
            )
        return found
    made = {}
    for name, model in models.items():
        kind = getattr(diffusers, model.record.get("sampled", {}).get("class", ""), None)
        if kind is None or not model.config:
            raise ConfigError(f"{name} cannot be made from its config: give --reference")
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            made[name] = kind.from_config(copy.deepcopy(dict(model.config))).eval()
        if chosen.device is not None:
            made[name] = made[name].to(chosen.device)
    return made


def _text(facts: dict[str, Any]) -> str:
    of = facts["reference"] or "random weights from the config, so times alone can be compared"
    lines = [f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}; original: {of}"]
    for name, result in facts["denoisers"].items():
        sizes = ", ".join(f"{path} {tuple(shape)}" for path, shape in result["sizes"].items())
        lines.append(f"{name}: {sizes}")
        for row in result["times"]:
            what = f"{row['median']:9.2f} ms ({row['low']:.2f} to {row['high']:.2f})"
            lines.append(f"  {row['name']:36} {row['failed'] or what}")
        quality = "" if result["sqnr"] is None else f"; output SQNR {result['sqnr']:.1f} dB"
        lines.append(f"  {result['speedup']:.2f} x the faster baseline{quality}")
    return "\n".join(lines)
