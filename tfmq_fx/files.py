"""Where files go that are kept between runs; a file that appears complete, or not at all, whenever
the process dies."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def cache_folder() -> Path:
    """Where results that can be made anew are kept: $TFMQ_FX_CACHE, or tfmq_fx in the user's cache
    directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("TFMQ_FX_CACHE") or Path(base, "tfmq_fx"))


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `content`, text in UTF-8, beside `path` and rename it when it is on disk.

    Raises OSError where it cannot be written; what was at `path` is then still there.
    """
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with made.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)
