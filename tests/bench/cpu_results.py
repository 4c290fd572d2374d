"""What a run on the CPU found, as JSON lines and as tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_PACKAGES = ("torch", "torchao", "openvino", "nncf", "diffusers")
_IDLE_MS = 2.0  # of processor time in a round while others compute
COLUMNS = (
    "variant",
    "ms (middle half)",
    "x fp32",
    "x bf16",
    "SQNR dB",
    "MiB",
    "preparing MiB",
    "saved MiB",
    "prepare + start s",
    "int8 kernels",
    "coverage %",
    "",
)


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on, when, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.processor()).strip(),
        "cores": os.cpu_count(),
        "threads": threads,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _git("rev-parse", "--short", "HEAD") + "+" * bool(_git("diff", "HEAD", "--stat")),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def append(path: Path, result: Mapping[str, Any]) -> None:
    """Add one line."""
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def fastest(times: Mapping[str, list[float]], names: list[str]) -> str | None:
    """The name with the smallest median among those that were timed."""
    known = [name for name in names if times.get(name)]
    return min(known, key=lambda name: statistics.median(times[name]), default=None)


def timed(values: list[float]) -> dict[str, Any]:
    """Median and middle half of milliseconds."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"ms": statistics.median(values), "middle_half": [low, high], "times": values}


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines to print of one model."""
    settings = result["settings"]
    size, imports = (
        max((row.get(key, 0) for row in result["rows"].values()), default=0)
        for key in ("parameters", "imports_bytes")
    )
    yield (
        f"{result['case']}: {size / 1e6:.1f}M parameters, seed {settings['seed']}, "
        f"{settings['steps']} steps, medians of {settings['repeats']}, recipe "
        f"{settings['recipe']}; {imports / 2**20:.0f} MiB of each process are Python and torch"
    )
    yield ""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for name, row in result["rows"].items():
        cells = [name, row["failed"]] if "failed" in row else [name, *_cells(row)]
        yield "| " + " | ".join([*cells, *[""] * (len(COLUMNS) - len(cells))]) + " |"


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    low, high = row["middle_half"]
    yield f"{row['ms']:.1f} ({low:.1f} to {high:.1f})"
    for base in ("fp32_ms", "bf16_ms"):
        yield f"{row[base] / row['ms']:.2f}" if row[base] else ""
    yield "" if row["sqnr"] is None else f"{row['sqnr']:.1f}"
    yield f"{row['steady_bytes'] / 2**20:.0f}"
    yield f"{row['preparing_bytes'] / 2**20:.0f}"
    yield f"{row['saved_bytes'] / 2**20:.1f}"
    yield f"{row['preparing_seconds']:.0f} + {row['start_seconds']:.0f}"
    yield str(sum(row["kernels"].values()) or "")
    yield " / ".join(f"{100 * share:.1f}" for share in row["coverage"])
    waking = f"; {row['idle_ms']:.0f} ms of processor time while idle"
    yield row["note"] + waking * (row["idle_ms"] > _IDLE_MS)
