"""`tfmq-fx sample`: draw pictures with the pipeline in a directory."""

from __future__ import annotations

import argparse
import inspect
import io
import math
import time
from pathlib import Path
from typing import Any

from tfmq_fx.core.errors import ConfigError

from .cli_options import Commands, add_call, answer, call_of, command, set_run, steps_of

EXAMPLES = """\
  tfmq-fx sample out --prompt "a lighthouse in the fog" --out picture.png
  tfmq-fx sample out --prompt "a cat" "a dog" --seed 7 --guidance 5 --out pictures.png
  tfmq-fx sample dit-out --label 207 360 --out classes.png --backend eager
  tfmq-fx sample ddpm-out --count 4 --out digits.png
"""
_FRAMES = 16  # of a video, in its grid


def add(commands: Commands) -> None:
    """Add the command."""
    what = "draw pictures with the pipeline in a directory, quantized or not"
    parser = command(commands, "sample", what, EXAMPLES)
    add = parser.add_argument
    add("pipeline", metavar="DIR", type=Path, help="directory of a pipeline")
    text = (
        "file to write; of several pictures each gets a number, picture-1.png, and videos become "
    )
    text += f"a grid of {_FRAMES} frames at most"
    add("--out", metavar="FILE.png", type=Path, required=True, help=text)
    add("--prompt", metavar="TEXT", nargs="+", help="what to draw, a picture each")
    add("--negative-prompt", metavar="TEXT", help="what not to draw")
    add("--label", metavar="CLASS", type=int, nargs="+", help="classes to draw, a picture each")
    add("--count", type=int, help="pictures, of pipelines without prompts or labels (1)")
    add("--steps", type=int, help="sampling steps (those it was quantized for)")
    add("--guidance", type=float, help="guidance scale (the pipeline's)")
    add("--seed", type=int, default=0, help="of the noise (0)")
    text = "what runs the denoiser: auto (the default: the fastest here, which takes minutes to "
    text += "find out once), inductor, openvino, float or eager"
    add("--backend", default="auto", help=text)
    add("--device", help="where to compute, as cuda (the CPU)")
    add_call(parser)
    set_run(parser, run)


def run(chosen: argparse.Namespace) -> int:
    """Draw, write the files, and print their names."""
    from tfmq_fx.pipelines.denoisers import denoisers
    from tfmq_fx.pipelines.pipeline_folder import load_pipeline
    from tfmq_fx.pipelines.record_inputs import call_pipeline

    if chosen.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {chosen.out}: the name must end in .png")
    if not chosen.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {chosen.out}: there is no directory {chosen.out.parent}")
    call = call_of(chosen)
    pipeline = load_pipeline(chosen.pipeline, chosen.device)
    steps = chosen.steps or next(filter(None, map(steps_of, denoisers(pipeline).values())), None)
    arguments = _arguments(chosen, pipeline, call, steps)
    backends = _compile(pipeline, chosen.backend)
    pipeline.set_progress_bar_config(disable=chosen.quiet)
    begun = time.perf_counter()
    pictures = _pictures(call_pipeline(pipeline, **arguments))
    seconds = time.perf_counter() - begun
    paths = [chosen.out]
    if len(pictures) > 1:
        paths = [chosen.out.with_stem(f"{chosen.out.stem}-{i + 1}") for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        _write(path, picture)
    facts = {
        "images": [str(path) for path in paths],
        "pipeline": type(pipeline).__name__,
        "steps": steps,
        "seed": chosen.seed,
        "backends": backends,
        "seconds": round(seconds, 2),
    }
    how = ", ".join(f"{name} on {backend}" for name, backend in backends.items())
    text = "\n".join([*facts["images"], f"drawn in {seconds:.1f} s{f' ({how})' if how else ''}"])
    answer(chosen, facts, text)
    return 0


def _arguments(
    chosen: argparse.Namespace, pipeline: Any, call: dict[str, Any], steps: int | None
) -> dict[str, Any]:
    """The arguments of the pipeline's call. Raises ConfigError for one that it does not take."""
    import torch

    kind = type(pipeline).__name__
    takes = inspect.signature(pipeline.__call__).parameters
    given = {
        "prompt": ("--prompt", chosen.prompt),
        "negative_prompt": ("--negative-prompt", chosen.negative_prompt),
        "class_labels": ("--label", chosen.label),
        "batch_size": ("--count", chosen.count),
        "num_inference_steps": ("--steps", steps),
    }
    arguments = {name: value for name, (_, value) in given.items() if value is not None} | call
    for name in arguments:
        option = given[name][0] if name in given else f"{name}="
        if name not in takes:
            raise ConfigError(f"a {kind} takes no {option}; it takes {', '.join(takes)}")
    for name in ("prompt", "class_labels"):
        others = [f"{name}_embeds"] if name == "prompt" else []
        if name in takes and not any(each in arguments for each in (name, *others)):
            raise ConfigError(f"a {kind} needs {given[name][0]}: what to draw")
    if chosen.negative_prompt is not None and chosen.prompt is not None:
        arguments["negative_prompt"] = [chosen.negative_prompt] * len(chosen.prompt)
    if "generator" in takes:
        arguments["generator"] = torch.Generator().manual_seed(chosen.seed)
    return arguments


def _compile(pipeline: Any, backend: str) -> dict[str, str]:
    """Compile the quantized denoisers in place; returns the backend of each."""
    from tfmq_fx import api
    from tfmq_fx.backends import backend_module
    from tfmq_fx.conversion.models import Converted
    from tfmq_fx.pipelines.denoisers import denoisers

    if backend != "auto":
        backend_module(backend)
    used = {}
    for name, model in denoisers(pipeline).items():
        if isinstance(model, Converted):
            compiled = api.compile(model, backend)
            setattr(pipeline, name, compiled)
            used[name] = compiled.backend
    return used


def _pictures(drawn: Any) -> list[Any]:
    """The pictures that a pipeline drew, or a grid of the frames of each video."""
    for name in ("images", "frames"):
        found = getattr(drawn, name, None)
        if isinstance(found, list) and found:
            return [_grid(each) if isinstance(each, list) else each for each in found]
    raise ConfigError(
        f"this pipeline drew no pictures but a {type(drawn).__name__}, which cannot be written as "
        ".png. Call it from Python"
    )


def _grid(frames: list[Any]) -> Any:
    from .difference_image import pillow

    shown = frames[:: -(-len(frames) // _FRAMES)]
    columns = math.isqrt(len(shown) - 1) + 1
    width, height = shown[0].size
    rows = -(-len(shown) // columns)
    grid = pillow("Image").new("RGB", (columns * width, rows * height))
    for i, frame in enumerate(shown):
        grid.paste(frame, (i % columns * width, i // columns * height))
    return grid


def _write(path: Path, picture: Any) -> None:
    from tfmq_fx.core.files import write_whole

    content = io.BytesIO()
    picture.save(content, format="PNG")
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error}") from error
