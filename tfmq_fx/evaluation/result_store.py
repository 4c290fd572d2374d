"""One result of an evaluation, kept under a name that says what it is of: an interrupted run goes
on, runs may go side by side, and nothing that changed takes a stale result."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.files import write_whole
from tfmq_fx.core.reading import open_regular, read_json
from tfmq_fx.core.version import __version__
from tfmq_fx.serialization.checkpoint import digest
from tfmq_fx.serialization.json_values import without_infinities

FORMAT = 2
FULL_PRECISION = "full precision"
DONE, FAILED, NOT_RUN = "done", "failed", "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one result is of.

    model, recipe, bits: names; `bits` is "" for full precision and for a recipe that has none.
    config: the recipe as JSON-ready values; None is full precision.
    contents: digest of the denoiser's and the classifier's weights.  reference: what images the
    statistics are taken against.  seed: see `benchmark.seeds_of`.  samples: images drawn.  steps:
    of DDIM.  batch: images at a time.  backend, device: where it samples.
    """

    model: str
    recipe: str
    bits: str
    config: Mapping[str, Any] | None
    contents: str
    reference: str
    seed: int
    samples: int
    steps: int
    batch: int
    backend: str
    device: str

    @property
    def subject(self) -> dict[str, Any]:
        """All of it, JSON-ready, with the versions that results depend on."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"format": FORMAT, "version": __version__}

    @property
    def key(self) -> str:
        """Sixteen hex digits that stand for all of it."""
        return digest(self.subject)[:16]

    @property
    def title(self) -> str:
        """For people."""
        recipe = self.recipe if self.recipe.endswith(self.bits) else f"{self.recipe}-{self.bits}"
        return f"{self.model} {recipe} seed {self.seed}"


class Cells:
    """The results in a directory: KEY.json, and KEY.safetensors with images for a grid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The result of `cell`: its `status`, "done" with `figures` or "failed" with `error`. None
        where there is none, or a damaged one."""
        try:
            found = read_json(self.folder / f"{cell.key}.json")
            whole = json.loads(json.dumps(cell.subject)) == found["subject"]
            if found["status"] == DONE:
                whole = (
                    whole and isinstance(found["figures"], dict) and self.images(cell) is not None
                )
            else:
                whole = whole and found["status"] == FAILED and isinstance(found["error"], str)
        except (ArtifactError, OSError, ValueError, KeyError, TypeError):
            return None
        return found if whole else None

    def images(self, cell: Cell) -> Tensor | None:
        """The first images of `cell`, (n, channels, height, width) in [-1, 1], at 256 levels; None
        where there are none."""
        try:
            open_regular(self.folder / f"{cell.key}.safetensors").close()
            levels = load_file(self.folder / f"{cell.key}.safetensors")["images"]
        except Exception:  # missing or damaged: safetensors has errors of its own kind
            return None
        if levels.dim() != 4 or levels.dtype != torch.uint8:
            return None
        return levels.float() / 127.5 - 1

    def write(self, cell: Cell, result: Mapping[str, Any], images: Tensor | None = None) -> None:
        """Keep a result, `status` included. The images appear first: with the JSON it is done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if images is not None:
            levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).contiguous()
            write_whole(self.folder / f"{cell.key}.safetensors", save({"images": levels}))
        data = without_infinities({"subject": cell.subject, **result})
        text = json.dumps(data, indent=1, allow_nan=False)
        write_whole(self.folder / f"{cell.key}.json", text + "\n")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What this runs on: processor, threads, versions."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: what the platform says
    found = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
