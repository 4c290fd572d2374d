"""Run the `tfmq-fx` command: parse arguments, call the library, print."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfmq_fx.core.errors import ConfigError, TfmqError
from tfmq_fx.core.version import __version__

from . import cli_bench, cli_quantize, cli_sample
from .cli_options import CODES, command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 for an error of the library, 2 for a model
    that is not ok, 130 where it was interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    chosen = _parser().parse_args(words)
    chosen.line = shlex.join(["tfmq-fx", *words])
    try:
        status: int = chosen.run(chosen)
        return status
    except TfmqError as error:
        print(f"tfmq-fx: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(f"  {note}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tfmq-fx: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfmq-fx",
        description="Quantize diffusion denoisers.",
        epilog=f"`tfmq-fx COMMAND --help` has examples.\n\n{CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    for each in (cli_quantize, cli_sample, cli_bench):
        each.add(commands)

    what = "quantize the digits model four ways and compare"
    demo = command(commands, "demo", what, "  tfmq-fx demo --out demo-out --samples 512\n")
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    demo.add_argument("--samples", type=int, default=512, help="images drawn for each FID")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")

    what = "print what was done to a saved model, or to the denoisers of a pipeline"
    report = command(commands, "report", what, "  tfmq-fx report unet-w4a8\n  tfmq-fx report out\n")
    report.set_defaults(run=_report)
    text = "directory written by tfmq_fx.save, or by `tfmq-fx quantize`"
    report.add_argument("model", type=Path, help=text)

    what = "show what depends on the timestep alone in a model, from its config"
    analyze = command(commands, "analyze", what, "  tfmq-fx analyze unet/config.json --steps 28\n")
    analyze.set_defaults(run=_analyze)
    analyze.add_argument("model", type=Path, help="diffusers config.json, or a directory with one")
    analyze.add_argument("--steps", type=int, default=50, help="timesteps to count tables for")
    analyze.add_argument("--timestep", metavar="NAME", help="which input is the timestep")
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    text = "inputs fixed for a request; left out, all but the sample and the timestep"
    analyze.add_argument("--condition", metavar="NAME", **several, help=text)
    analyze.add_argument("--depth", type=int, default=2, help="module levels drawn")
    text = "files to write: .svg or .dot for a picture, .json, .txt"
    analyze.add_argument("--out", metavar="FILE", type=Path, default=[], **several, help=text)

    what = "compare a saved model with the one it was made from, and name culprits"
    examples = "  tfmq-fx verify stable-diffusion/unet out/unet --threshold 25\n"
    verify = command(commands, "verify", what, examples)
    verify.set_defaults(run=_verify)
    text = 'directory written by diffusers\' save_pretrained, or "digits", "glyphs", "glyphs-unet"'
    verify.add_argument("reference", help=text)
    verify.add_argument("model", type=Path, help="directory written by tfmq_fx.save")
    text = "output SQNR that a lossy model must reach"
    verify.add_argument("--threshold", metavar="DB", type=float, help=text)
    verify.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    verify.add_argument("--seed", type=int, default=0, help="of the inputs drawn")
    verify.add_argument("--quiet", action="store_true", help="no progress bars")

    what = "compare recipes on the shipped models: quality, bytes and time in a table"
    evaluate = command(commands, "evaluate", what, "  tfmq-fx evaluate --small\n")
    evaluate.set_defaults(run=_evaluate)
    _add_evaluate(evaluate)
    return parser


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`; those left out are its own defaults, or those of --small."""
    add = parser.add_argument
    add("--models", metavar="NAME", nargs="+", help="digits, glyphs-dit, ...")
    add("--recipes", metavar="NAME", nargs="+", help="nearest, tfmq, best, ...")
    add("--bits", metavar="BITS", nargs="+", help="w8a8, w4a8, w6a6, w4a6, w4a4")
    add("--samples", type=int, help="images for each FID (5000)")
    add("--seeds", type=int, nargs="+", help="of calibration and sampling (0 1 2)")
    add("--steps", type=int, help="DDIM steps (20)")
    add(
        "--learning",
        metavar="STEPS",
        type=lambda text: int(text) if text.isdecimal() else text,
        help='the most learning steps a block (100), or "published": as they are, hours each',
    )
    add("--out", type=Path, default=Path("evaluation"), help="folder for results")
    add("--small", action="store_true", help="digits at W4A8, 1,000 images, one seed: minutes")
    add("--device", help="cpu (the default) or cuda")
    add("--backend", help="what samples: inductor (the default) or eager")
    add("--retry", action="store_true", help="compute failed results again")
    add("--table", action="store_true", help="compute nothing, write the tables")
    add("--quiet", action="store_true", help="no progress bars")


def _demo(chosen: argparse.Namespace) -> int:
    from tfmq_fx.core.distributed import started

    from .demo import run

    with started():
        run(chosen.out, samples=chosen.samples, progress=not chosen.quiet)
    return 0


def _report(chosen: argparse.Namespace) -> int:
    from tfmq_fx.diagnostics.report import report
    from tfmq_fx.pipelines.pipeline_folder import INDEX
    from tfmq_fx.prologue.load_model import load
    from tfmq_fx.serialization.artifact import GRAPH_FILE

    models = [chosen.model]
    if (chosen.model / INDEX).is_file():  # of a pipeline
        models = sorted(path.parent for path in chosen.model.glob(f"*/{GRAPH_FILE}"))
        if not models:
            raise ConfigError(f"{chosen.model} has no quantized denoiser: see tfmq-fx quantize")
    for model in models:
        name = "" if model == chosen.model else f"{model.name}: "
        print(f"{name}{report(load(model))}")
    return 0


def _analyze(chosen: argparse.Namespace) -> int:
    from tfmq_fx.diagnostics.analyze import analyze

    analysis = analyze(
        chosen.model, timestep=chosen.timestep, conditions=chosen.condition, steps=chosen.steps
    )
    print(analysis)
    for path in chosen.out:
        analysis.save(path, depth=chosen.depth)
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    """Compare, print and write; the exit status is 2 where the model is not ok."""
    from tfmq_fx.diagnostics.verify import verify
    from tfmq_fx.prologue.load_model import load

    from .load_reference import load_reference

    model = load(chosen.model)
    result = verify(
        load_reference(chosen.reference, model.dtype),
        model,
        threshold=chosen.threshold,
        seed=chosen.seed,
        progress=not chosen.quiet,
    )
    print(result)
    if chosen.json is not None:
        result.save(chosen.json)
    return 0 if result.ok else 2


def _evaluate(chosen: argparse.Namespace) -> int:
    """Evaluate and print the table; the exit status is 130 where it was interrupted."""
    from tfmq_fx.core.distributed import rank, started

    from .evaluate import SMALL, evaluate

    names = ("models", "recipes", "bits", "samples", "seeds", "steps", "learning", "device")
    values = {name: getattr(chosen, name) for name in (*names, "backend")}
    options = {name: value for name, value in values.items() if value is not None}
    if chosen.small:
        options = {**SMALL, **options}
    status = 0
    with started():
        try:
            evaluate(
                out=chosen.out,
                compute=not chosen.table,
                retry=chosen.retry,
                progress=not chosen.quiet,
                command=chosen.line,
                **options,
            )
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            status = 130
        if rank():
            return status
    print(f"\n{(chosen.out / 'table.md').read_text(encoding='utf-8')}")
    print(f"Tables and grids: {chosen.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
