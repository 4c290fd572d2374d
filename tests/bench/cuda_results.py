"""Results that outlive the process that measures them, and the processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tfmq_fx.core.files import write_whole

BROKEN = 3  # exit status: the device cannot be used by this process any more
_GRACE = 10  # seconds that a process gets beyond its time


class Results:
    """What is known so far, in a file: a process that dies leaves all that it had measured.

    rows: by "case / variant".  failed: reasons.  started: what is being worked on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"rows": {}, "failed": {}, "started": None, "machine": {}}
        if path.exists():
            self.data |= json.loads(path.read_text())

    def write(self, **changed: Any) -> None:
        """Set entries and have all of it on disk."""
        self.data |= changed
        write_whole(self.path, json.dumps(self.data, indent=1))

    def add(self, key: str, row: dict[str, Any]) -> None:
        """A row measured, or measured again."""
        self.data["rows"][key] = row
        self.data["failed"].pop(key, None)
        self.write()

    def fail(self, key: str, reason: str) -> None:
        """Why there is no row; one that there was is void."""
        self.data["rows"].pop(key, None)
        self.data["failed"][key] = reason
        self.write(started=None)
        print(f"{key}: {reason}", file=sys.stderr, flush=True)


def reason_of(error: BaseException) -> str:
    """The error in one line."""
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def supervise(
    start: Callable[[float], int | None], results: Callable[[], Results], deadline: float
) -> str | None:
    """Run processes until one comes to its end; what one died of is not tried again.

    Returns why not everything was tried, or None.  start: runs a process until `deadline`; its exit
    status, or None where it ran out of time.
    """
    while True:
        status = start(deadline)
        found = results()
        if status == 0:
            return None
        begun = found.data["started"]
        if status is None:
            if begun:
                found.fail(begun, "skipped: out of time")
            return None
        if status == BROKEN and not begun:  # it said itself what it died of
            continue
        if not begun or begun in found.data["failed"]:
            return f"the process ended with status {status}"
        found.fail(begun, f"failed: the process ended with status {status}")


def launcher(argv: Sequence[str]) -> Callable[[float], int | None]:
    """Starts this bench in a process of its own."""

    def start(deadline: float) -> int | None:
        command = [sys.executable, "-m", "tests.bench.bench_cuda", *argv, "--until", str(deadline)]
        with subprocess.Popen(command) as child:
            try:
                return child.wait(timeout=max(deadline + _GRACE - time.time(), 1))
            except subprocess.TimeoutExpired:
                child.kill()
                return None

    return start
