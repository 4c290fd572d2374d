"""Temporary files and folders that do not outlive their process, not even where it is killed.

Each is locked as long as its process needs it. The system gives up the locks of a process that
ends, however it ends, so what has a name of ours and no lock was left, and the next process to make
one there removes it. Where the system has no such locks (`flock`) nothing is taken for left.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

_TOKEN = "[0-9a-f]{16}"


@contextlib.contextmanager
def file_beside(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside `target`, of that mode less the umask, which is gone afterwards unless
    it was renamed."""

    def make(path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

    path, lock = _claimed(target.parent, f".{target.name}.part-", make)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


@contextlib.contextmanager
def folder_beside(target: Path, purpose: str) -> Iterator[Path]:
    """An empty folder beside `target` that is gone afterwards unless it was renamed."""
    path, lock = _claimed(target.parent, f".{target.name}.{purpose}-", os.mkdir)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def folder_of(owner: object, kind: str) -> tuple[Path, Callable[[], object]]:
    """An empty folder where `tempfile` puts such (TMPDIR), for this user alone; what removes it is
    called when `owner` is gone, if not before."""
    path, lock = _claimed(
        Path(tempfile.gettempdir()), f"tfmq_fx-{kind}-", lambda path: path.mkdir(mode=0o700)
    )
    return path, weakref.finalize(owner, _remove, path, lock)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _claimed(folder: Path, prefix: str, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new path in `folder`, made, and the open descriptor that holds its lock."""
    _remove_left(folder, re.compile(re.escape(prefix) + _TOKEN))
    while True:
        path = folder / f"{prefix}{secrets.token_hex(8)}"
        make(path)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for left before it was locked
            continue
        _lock(descriptor, waits=True)
        if _is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def _remove_left(folder: Path, name: re.Pattern[str]) -> None:
    """Remove what has such a name in a folder, is this user's, and has no process any more."""
    try:
        found = [entry.path for entry in os.scandir(folder) if name.fullmatch(entry.name)]
    except OSError:
        return
    for each in found:
        path = Path(each)
        with contextlib.suppress(OSError):  # others may be removing it
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                continue
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                mine = os.fstat(descriptor).st_uid == os.geteuid() if fcntl else False
                if mine and _lock(descriptor, waits=False) and _is_at(path, descriptor):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int, *, waits: bool) -> bool:
    """Whether the lock was free and is this process's now, until the descriptor is closed."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without locks
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether what was opened is still there by its name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
