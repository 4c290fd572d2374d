"""A directory that is replaced as a whole: complete, or as it was, whenever the process dies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tfmq_fx.core.errors import ArtifactError


def swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; a directory cannot be renamed over a full one."""
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
    """Where the content of `target` lies: beside it, if a process died between the two renames.
    marker: a file that it has."""
    backup = _backup(target)
    return backup if not target.exists() and (backup / marker).exists() else target


def recover(target: Path, marker: str) -> None:
    """Finish or undo what a process that died left of a swap."""
    if present(target, marker) != target:
        os.rename(_backup(target), target)


def make_parents(parent: Path) -> None:
    """Make a directory that can be written to. Raises ArtifactError."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the directory {parent}: {error}") from error
    if not os.access(parent, os.W_OK):
        raise ArtifactError(f"the directory {parent} is not writable")


def sync(path: Path) -> None:
    """Return when a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _backup(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"
