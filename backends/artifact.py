"""What torch.compile made, kept in a file, so that a later start does not compile again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tfmq_fx.errors import ConfigError
from tfmq_fx.files import write_whole

logger = logging.getLogger(__name__)
T = TypeVar("T")


def with_artifact(path: Path, compile_and_run: Callable[[], T]) -> T:
    """The result of a call that compiles, with what it compiles read from `path`, or written to it.

    The file is torch's own bundle of compiler caches: parts that do not fit this machine, torch or
    model are not used, and what is compiled in their place is written. Raises ConfigError where
    `path` holds something else, or cannot be written.
    """
    from torch._dynamo.utils import counters

    if path.is_dir():
        raise ConfigError(f"artifact={str(path)!r} is a folder; name a file")
    if path.exists():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"artifact={str(path)!r} cannot be read: {error}") from error
        try:
            found = torch.compiler.load_cache_artifacts(content)
        except Exception as error:  # torch raises what its caches meet
            raise _no_artifact(path) from error
        if found is None:  # what does not unpack is logged by torch
            raise _no_artifact(path)
        logger.info("read %s: %s", path, found)
    before = counters["inductor"]["fxgraph_cache_miss"]
    result = compile_and_run()
    if path.exists() and counters["inductor"]["fxgraph_cache_miss"] == before:
        return result
    if (made := torch.compiler.save_cache_artifacts()) is None:
        logger.warning("torch kept nothing of what it compiled: %s is not written", path)
        return result
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, made[0])
    except OSError as error:
        raise ConfigError(f"artifact={str(path)!r} cannot be written: {error}") from error
    return result


def _no_artifact(path: Path) -> ConfigError:
    return ConfigError(
        f"artifact={str(path)!r} holds no compiled model. Remove it, or name another file."
    )
