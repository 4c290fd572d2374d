"""Arguments and answers that several commands have in common."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.serialization.json_values import without_infinities

Commands = Any  # what argparse's add_subparsers returns; its class is private

CODES = """\
exit status:
  0    done
  1    an error, which is told on stderr in one line with a remedy
  2    wrong arguments; `verify`: the model is not ok
  130  interrupted; nothing half-written is left
"""


def command(commands: Commands, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    """A command's parser, whose --help ends with examples and the exit codes."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"examples:\n{examples}\n{CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def set_run(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Have a command call `run`, and add --json and --quiet, which it heeds by `answer`."""

    def within(chosen: argparse.Namespace) -> int:
        with _output_of(chosen):
            return run(chosen)

    parser.set_defaults(run=within)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_call(parser: argparse.ArgumentParser) -> None:
    """Add what a pipeline is called with besides its prompts."""
    add = parser.add_argument
    add("--image", metavar="FILE", type=Path, help="image that the pipeline starts from")
    add("--mask", metavar="FILE", type=Path, help="mask of that image, for inpainting")
    text = "another argument of the pipeline's call, as --set height=512; the value is JSON or text"
    add("--set", metavar="NAME=VALUE", action="append", default=[], help=text)


def call_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's call that `add_call` and --guidance read.

    Raises ConfigError for a pair without a name, and an image that cannot be read.
    """
    call: dict[str, Any] = {}
    for pair in chosen.set:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set {pair!r} must be NAME=VALUE, as --set height=512")
        try:
            call[name] = json.loads(value)
        except ValueError:
            call[name] = value
    if chosen.guidance is not None:
        call["guidance_scale"] = chosen.guidance
    for name, path in (("image", chosen.image), ("mask_image", chosen.mask)):
        if path is not None:
            call[name] = _image(path)
    return call


def _image(path: Path) -> Any:
    from .difference_image import pillow

    try:
        return pillow("Image").open(path).convert("RGB")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as an image: {error}") from error


def answer(chosen: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    """Print a command's result: `facts` with --json, else `text`."""
    if chosen.json:
        text = json.dumps(without_infinities(facts), allow_nan=False)
    print(text, file=chosen.stdout, flush=True)


@contextlib.contextmanager
def _output_of(chosen: argparse.Namespace) -> Iterator[None]:
    """A context that keeps stdout for `answer`, and the bars of other libraries from --quiet.

    What else is printed meanwhile goes to stderr.
    """
    chosen.stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        if chosen.quiet:
            for library in ("diffusers", "transformers"):
                if importlib.util.find_spec(library) is not None:
                    logging = importlib.import_module(f"{library}.utils.logging")
                    if logging.is_progress_bar_enabled():
                        logging.disable_progress_bar()
                        stack.callback(logging.enable_progress_bar)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def steps_of(model: Any) -> int | None:
    """The sampling steps that a pipeline's denoiser was calibrated with, where it says so."""
    steps = getattr(model, "record", {}).get("sampled", {}).get("steps")
    return steps if isinstance(steps, int) else None
