"""Replace a directory as a whole, so that a crash leaves either the old or the new one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tfmq_fx.core.errors import ArtifactError


def swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`, by two renames; a full directory cannot be replaced."""
    backup = _backup(target)
    if not target.exists() or not any(target.iterdir()):
        os.replace(new, target)
        return
    shutil.rmtree(backup, ignore_errors=True)
    os.replace(target, backup)
    try:
        os.replace(new, target)
    except BaseException:
        os.rename(backup, target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def present(target: Path, marker: str) -> Path:
    """Return the directory that holds the content of `target`.

    It lies beside `target` if a process died between the two renames.  marker: a file in it.
    """
    backup = _backup(target)
    return backup if not target.exists() and (backup / marker).exists() else target


def recover(target: Path, marker: str) -> None:
    """Undo an interrupted swap."""
    if present(target, marker) != target:
        os.rename(_backup(target), target)


def make_parents(parent: Path) -> None:
    """Make a directory with its parents. Raises ArtifactError unless it can be written to."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the directory {parent}: {error}") from error
    if not os.access(parent, os.W_OK):
        raise ArtifactError(f"the directory {parent} is not writable")


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _backup(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"
