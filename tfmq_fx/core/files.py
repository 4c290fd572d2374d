"""Locate the cache folder, check who can write a file, and write files atomically."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from .temporary_files import folder_beside


def cache_folder() -> Path:
    """The folder for results that can be computed again: $TFMQ_FX_CACHE, or tfmq_fx in the user's
    cache directory, or a folder in TMPDIR for a user without a home."""
    if named := os.environ.get("TFMQ_FX_CACHE"):
        return Path(named).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "tfmq_fx")
    try:
        return Path.home() / ".cache" / "tfmq_fx"
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        user = os.geteuid() if hasattr(os, "geteuid") else "user"
        return Path(tempfile.gettempdir(), f"tfmq_fx-{user}")


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents, readable by this user alone."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def distrusted(info: os.stat_result, writers: int = stat.S_IWGRP | stat.S_IWOTH) -> str | None:
    """The reason why others may have written a file or folder, or None if only this user and root
    can.

    writers: mode bits that others must not have.
    """
    if not hasattr(os, "geteuid"):
        return None
    if info.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {info.st_uid}, not to you (user {os.geteuid()})"
    if info.st_mode & writers:
        return f"others can write it (mode {stat.S_IMODE(info.st_mode):04o})"
    return None


def open_trusted(path: str | Path, within: int | None = None) -> int:
    """Open a file or folder that only this user and root can have written; returns a descriptor.

    within: descriptor of the folder that `path` is relative to; links are then refused.
    The open file is checked, so nothing can be put in its place in between.
    Raises OSError; PermissionError, with the reason, where others can write it.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # else a pipe waits for ever
    flags |= 0 if within is None else getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, dir_fd=within)
    info = os.fstat(descriptor)
    reason = distrusted(info)
    if reason is None and not stat.S_ISDIR(info.st_mode) and not stat.S_ISREG(info.st_mode):
        reason = "it is neither a file nor a folder"
    if reason is not None:
        os.close(descriptor)
        raise PermissionError(reason)
    return descriptor


def write_whole(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write `content` (text as UTF-8) to `path`, complete or not at all.

    mode: of the file, less the umask.
    Raises OSError where it cannot be written; what was at `path` is then still there.
    """
    with folder_beside(path, "part") as folder:
        new = folder / "content"
        descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
