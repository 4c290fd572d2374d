"""The `tfmq-fx` command: parse, call the library, print."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tfmq_fx.core.errors import TfmqError
from tfmq_fx.core.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 for an error of the library, 2 for a model
    that is not ok."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = _parser().parse_args(given)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "demo": _demo,
        "report": _report,
        "analyze": _analyze,
        "verify": _verify,
        "evaluate": lambda chosen: _evaluate(chosen, given),
    }
    try:
        return commands[chosen.command](chosen)
    except TfmqError as error:
        print(f"tfmq-fx: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(f"  {note}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tfmq-fx", description="Quantize diffusion denoisers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="quantize the digits model four ways and compare")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    demo.add_argument("--samples", type=int, default=512, help="images drawn for each FID")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    show = commands.add_parser("report", help="print what was done to a saved model")
    show.add_argument("model", type=Path, help="directory written by tfmq_fx.save")
    _add_analyze(commands)
    _add_verify(commands)
    _add_evaluate(commands)
    return parser


def _add_analyze(commands: Any) -> None:
    look = commands.add_parser(
        "analyze", help="tell what depends on the timestep alone in a model, from its config"
    )
    look.add_argument("model", type=Path, help="diffusers config.json, or a directory with one")
    look.add_argument("--steps", type=int, default=50, help="timesteps to count tables for")
    look.add_argument("--timestep", metavar="NAME", help="which input is the timestep")
    look.add_argument(
        "--condition",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="inputs fixed for a request; left out, all but the sample and the timestep",
    )
    look.add_argument("--depth", type=int, default=2, help="module levels drawn")
    look.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="files to write: .svg or .dot for a picture, .json, .txt",
    )


def _add_verify(commands: Any) -> None:
    check = commands.add_parser(
        "verify", help="compare a saved model with the one it was made from, and name culprits"
    )
    check.add_argument(
        "reference",
        help="directory written by diffusers' save_pretrained, or what ships: "
        '"digits", "glyphs" or "glyphs-unet"',
    )
    check.add_argument("model", type=Path, help="directory written by tfmq_fx.save")
    check.add_argument(
        "--threshold", metavar="DB", type=float, help="output SQNR that a lossy model must reach"
    )
    check.add_argument("--json", metavar="FILE", type=Path, help="write everything found as JSON")
    check.add_argument("--seed", type=int, default=0, help="of the inputs drawn")
    check.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_evaluate(commands: Any) -> None:
    """The arguments of `evaluate`; those left out are its own defaults, or those of --small."""
    judge = commands.add_parser(
        "evaluate", help="compare recipes on the shipped models: quality, bytes and time in a table"
    )
    judge.add_argument("--models", metavar="NAME", nargs="+", help="digits, glyphs-dit, ...")
    judge.add_argument("--recipes", metavar="NAME", nargs="+", help="nearest, tfmq, best, ...")
    judge.add_argument("--bits", metavar="BITS", nargs="+", help="w8a8, w4a8, w6a6, w4a6, w4a4")
    judge.add_argument("--samples", type=int, help="images for each FID (5000)")
    judge.add_argument("--seeds", type=int, nargs="+", help="of calibration and sampling (0 1 2)")
    judge.add_argument("--steps", type=int, help="DDIM steps (20)")
    judge.add_argument(
        "--learning",
        metavar="STEPS",
        type=lambda text: int(text) if text.isdecimal() else text,
        help='the most learning steps a block (100), or "published": as they are, hours each',
    )
    judge.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for results")
    judge.add_argument(
        "--small", action="store_true", help="digits at W4A8, 1,000 images, one seed: minutes"
    )
    judge.add_argument("--device", help="cpu (the default) or cuda")
    judge.add_argument("--backend", help="what samples: inductor (the default) or eager")
    judge.add_argument("--retry", action="store_true", help="compute failed results again")
    judge.add_argument("--table", action="store_true", help="compute nothing, write the tables")
    judge.add_argument("--quiet", action="store_true", help="no progress bars")


def _demo(chosen: argparse.Namespace) -> int:
    from tfmq_fx.core.distributed import started

    from .demo import run

    with started():
        run(chosen.out, samples=chosen.samples, progress=not chosen.quiet)
    return 0


def _report(chosen: argparse.Namespace) -> int:
    from tfmq_fx.diagnostics.report import report
    from tfmq_fx.prologue.load_model import load

    print(report(load(chosen.model)))
    return 0


def _analyze(chosen: argparse.Namespace) -> int:
    from tfmq_fx.diagnostics.analyze import analyze

    found = analyze(
        chosen.model, timestep=chosen.timestep, conditions=chosen.condition, steps=chosen.steps
    )
    print(found)
    for path in chosen.out:
        found.save(path, depth=chosen.depth)
    return 0


def _evaluate(chosen: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Evaluate and print the table; the exit status: 130 where it was interrupted."""
    from tfmq_fx.core.distributed import rank, started

    from .evaluate import SMALL, evaluate

    names = ("models", "recipes", "bits", "samples", "seeds", "steps", "learning", "device")
    given = {name: getattr(chosen, name) for name in (*names, "backend")}
    options = {name: value for name, value in given.items() if value is not None}
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
                command=shlex.join(["tfmq-fx", *arguments]),
                **options,
            )
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            status = 130
        if rank():
            return status
    print(f"\n{(chosen.out / 'table.md').read_text(encoding='utf-8')}")
    print(f"Tables, plots and grids: {chosen.out}")
    return status


def _verify(chosen: argparse.Namespace) -> int:
    """Compare, print and write; the exit status: 2 where the model is not ok."""
    from tfmq_fx.diagnostics.verify import verify
    from tfmq_fx.prologue.load_model import load

    from .load_reference import load_reference

    model = load(chosen.model)
    found = verify(
        load_reference(chosen.reference, model.dtype),
        model,
        threshold=chosen.threshold,
        seed=chosen.seed,
        progress=not chosen.quiet,
    )
    print(found)
    if chosen.json is not None:
        found.save(chosen.json)
    return 0 if found.ok else 2


if __name__ == "__main__":
    sys.exit(main())
