"""The workers of a bench, seen from the process that asks them in turn."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_HELD = 150.0  # seconds after which others may use the machine


class WorkerError(RuntimeError):
    """A worker said that it failed, ended, or did not answer in time."""


class Worker:
    """A process with one variant, which computes only while it is asked."""

    def __init__(self, settings: dict[str, Any], *, cache: Path, timeout: float) -> None:
        self.timeout = timeout
        folder = Path(settings["folder"])
        name = settings["variant"].replace(" ", "-")
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "tests.bench.cpu_worker", json.dumps(settings)]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache / name)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                bufsize=0,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to `request`. Raises WorkerError with the reason where there is none."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise WorkerError(self._ended()) from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer: the first, without being asked, comes when the variant is ready."""
        stream = self.process.stdout
        assert stream is not None
        if not select.select([stream], [], [], self.timeout)[0]:
            self.stop()
            raise WorkerError(f"failed: no answer within {self.timeout:.0f} s")
        line = stream.readline()
        if not line:
            raise WorkerError(self._ended())
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise WorkerError(found["failed"])
        return found

    def _ended(self) -> str:
        status = self.process.wait()
        return f"failed: the process ended with status {status}" + " (killed)" * (status == -9)

    def tail(self, lines: int = 12) -> str:
        """The end of what it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.communicate()


class Turn:
    """Holds a lock file while something is computed, so that benches take turns on a machine."""

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("w")
        self.since = 0.0

    def __enter__(self) -> Turn:
        if self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_EX)
        self.since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def pause(self) -> None:
        """Let others have their turn, if this one has been long."""
        if time.monotonic() - self.since > _HELD:
            self.__exit__()
            time.sleep(0.5)
            self.__enter__()
