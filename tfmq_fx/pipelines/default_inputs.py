"""Choose what a pipeline is called with where the user does not say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfmq_fx.calibration.call_batches import call_batches
from tfmq_fx.calibration.sampling_pass import takes_batch_size
from tfmq_fx.core.errors import ConfigError

PROMPTS = (
    "a lighthouse on a cliff in the fog, oil painting",
    "two cats asleep on a red sofa, photograph",
    "a bowl of oranges beside a window, soft light",
    "an astronaut riding a horse through a desert",
    "a street market at night in the rain, neon signs",
    "portrait of an old fisherman, black and white",
    "a snowy mountain above a lake at sunrise",
    "the words 'good morning' written on a blackboard",
)
"""The prompts that text pipelines are calibrated with where none are given."""

_CLASSES = 8  # labels where none are given
_TEXTS = ("prompt", "prompt_embeds")


def call_arguments(
    pipeline: Any, prompts: str | Sequence[str] | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of `pipeline`, by name: `given`, the prompts, and what is missing.

    Text pipelines get `PROMPTS` where there are neither prompts nor embeddings, those of classes
    eight labels evenly over the classes.
    Raises ConfigError for an argument that the pipeline does not take, and for one that it needs.
    """
    kind, parameters = type(pipeline).__name__, _parameters(pipeline)
    arguments = dict(given)
    if prompts is not None:
        if "prompt" not in parameters:
            raise ConfigError(f"a {kind} takes no prompts: leave prompts= out")
        if text := [name for name in _TEXTS if arguments.get(name) is not None]:
            raise ConfigError(f"give prompts= or {text[0]}=, not both")
        arguments["prompt"] = _checked(prompts)
    # diffusers' own take **kwargs for what is deprecated, and ignore the rest
    own = type(pipeline).__module__.startswith("diffusers.")
    open_ended = not own and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not open_ended and (unknown := sorted(set(arguments) - set(parameters))):
        raise ConfigError(f"a {kind} takes no {unknown[0]}=; it takes {', '.join(parameters)}")
    if "prompt" in parameters and all(arguments.get(name) is None for name in _TEXTS):
        arguments["prompt"] = [*PROMPTS]
    if arguments.get("prompt") is not None and _lacks_text_encoder(pipeline):
        raise ConfigError(
            f"this {kind} has no text encoder, so it takes no prompts: give what it takes instead, "
            "as prompt_embeds="
        )
    if "class_labels" in parameters and "class_labels" not in arguments:
        arguments["class_labels"] = _labels(pipeline)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in _NAMED]
    if missing := [name for name in needed if name not in arguments]:
        raise ConfigError(f"a {kind} needs {missing[0]}=: give what a call of it takes")
    return arguments


def in_batches(
    pipeline: Any, arguments: Mapping[str, Any], size: int | None
) -> tuple[dict[str, Any], int | None]:
    """The call that draws the first `size` samples of a call (2 for None), and the batch size that
    calibration then takes.

    A call whose samples cannot be told apart is left whole, without a batch size, unless `size`
    says otherwise: ConfigError.
    """
    if takes_batch_size(pipeline):
        return {"batch_size": size or 2, **arguments}, size
    try:
        _, first = call_batches((), arguments, size or 2)[0]
    except ConfigError:
        if size is not None:
            raise
        return dict(arguments), None
    return first, size or 2


def without_decoding(pipeline: Any) -> dict[str, Any]:
    """The argument that spares a pipeline decoding what it drew; none where it is not known."""
    try:
        code = inspect.getsource(type(pipeline).__call__)
    except (OSError, TypeError):
        return {}
    return {"output_type": "latent"} if _LATENT.search(code) else {}


_LATENT = re.compile(r"output_type [=!]= \"latent\"")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(pipeline.__call__).parameters)


def _checked(prompts: Any) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"prompts must be a text or a list of texts, got {prompts!r}")
    if not texts:
        raise ConfigError("prompts is empty: give one text at least, or leave it out")
    return list(texts)


def _lacks_text_encoder(pipeline: Any) -> bool:
    parts = {n: p for n, p in pipeline.components.items() if "text_encoder" in n}
    return bool(parts) and all(part is None for part in parts.values())


def _labels(pipeline: Any) -> list[int]:
    """Labels evenly over the classes."""
    count = 0
    for part in pipeline.components.values():
        config = getattr(part, "config", None)
        for name in ("num_class_embeds", "num_embeds_ada_norm"):
            count = count or int(getattr(config, name, None) or 0)
    if not count:
        raise ConfigError(
            f"it is not known how many classes this {type(pipeline).__name__} has: give "
            "class_labels="
        )
    return [i * count // _CLASSES for i in range(min(_CLASSES, count))]
