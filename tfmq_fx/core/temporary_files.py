"""Create temporary folders that are removed even if their process is killed.

Each folder is locked while its process uses it. The system releases the locks of a process that
ends, however it ends, so the next process to create a folder there removes those without a lock.
Where the system has no `flock`, nothing is regarded as left behind.
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


@contextlib.contextmanager
def folder_beside(target: Path, purpose: str) -> Iterator[Path]:
    """An empty folder beside `target`, removed afterwards unless it was renamed."""
    path, lock = _create(target.parent, f".{target.name}.{purpose}-", 0o777)
    try:
        yield path
    finally:
        _remove(path, lock)


def folder_of(owner: object, kind: str) -> tuple[Path, Callable[[], object]]:
    """An empty folder in TMPDIR for this user alone, and the function that removes it, which also
    runs when `owner` is garbage collected."""
    path, lock = _create(Path(tempfile.gettempdir()), f"tfmq_fx-{kind}-", 0o700)
    return path, weakref.finalize(owner, _remove, path, lock)


def _create(parent: Path, prefix: str, mode: int) -> tuple[Path, int]:
    """Create a folder in `parent`; returns its path and the open descriptor that holds its lock."""
    _remove_left_behind(parent, prefix)
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        path.mkdir(mode)
        if fcntl is None:
            return path, os.open(os.devnull, os.O_RDONLY)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it before it was locked
            continue
        _lock(descriptor, waits=True)
        if _is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def _remove(path: Path, lock: int) -> None:
    """Remove a folder and release its lock."""
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_left_behind(parent: Path, prefix: str) -> None:
    """Remove this user's folders of that prefix whose process has ended."""
    if fcntl is None:
        return
    name = re.compile(re.escape(prefix) + "[0-9a-f]{16}")
    with contextlib.suppress(OSError):
        for path in [each for each in parent.iterdir() if name.fullmatch(each.name)]:
            with contextlib.suppress(OSError):  # no folder, or others are removing it
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    is_own = os.fstat(descriptor).st_uid == os.geteuid()
                    if is_own and _lock(descriptor, waits=False) and _is_at(path, descriptor):
                        shutil.rmtree(path)
                finally:
                    os.close(descriptor)


def _lock(descriptor: int, *, waits: bool) -> bool:
    """Lock an open folder until its descriptor is closed; returns False where that fails."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without locks
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open folder is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
