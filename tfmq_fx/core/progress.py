"""Show progress bars for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from .distributed import rank

T = TypeVar("T")


def progress_bar(items: Iterable[T], description: str, *, enabled: bool) -> Iterable[T]:
    """Iterate over `items`, with a progress bar on the first process's stderr where enabled."""
    if not enabled or rank():
        return items
    bar: Iterable[T] = tqdm(items, desc=description, file=sys.stderr, leave=False)
    return bar
