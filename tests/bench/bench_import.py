"""How long `import tfmq_fx` takes, as a ratio to `import torch`, each in processes of its own.

    python -m tests.bench.bench_import

Prints one line of JSON: medians of 11, after one run that writes the bytecode.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import torch

REPEATS = 11
CODE = {"python": "", "torch": "import torch", "tfmq_fx": "import tfmq_fx"}


def seconds(code: str, environment: dict[str, str]) -> float:
    """Of a process that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for code in CODE.values():
            seconds(code, environment)
        taken: dict[str, list[float]] = {name: [] for name in CODE}
        for _ in range(REPEATS):  # in turns: what else the machine does is shared
            for name, code in CODE.items():
                taken[name].append(seconds(code, environment))
    middle = {name: statistics.median(values) for name, values in taken.items()}
    torch_alone = middle["torch"] - middle["python"]
    print(
        json.dumps(
            {
                "seconds": middle,
                "spread": {name: max(values) - min(values) for name, values in taken.items()},
                "import tfmq_fx / import torch": (middle["tfmq_fx"] - middle["python"])
                / torch_alone,
                "added / import torch": (middle["tfmq_fx"] - middle["torch"]) / torch_alone,
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
