"""Keep each result of an evaluation in a file named by everything it depends on.

So an interrupted run goes on, runs may share a directory, and nothing takes a stale result.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tfmq_fx.core.config import Config
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
    """Everything that one result depends on.

    model, recipe, bits: names; `bits` is "" for full precision and for a recipe without any.
    config: the recipe; None is full precision.
    contents: digest of the denoiser's and the classifier's weights.  reference: the images of the
    reference statistics, in words.  seed: see `benchmark.seeds_of`.  samples: images drawn.  steps:
    of DDIM.  batch: images at a time.  backend, device: where it samples.
    """

    model: str
    recipe: str
    bits: str
    config: Config | None
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
        """The fields as JSON returns them, with the versions that results depend on."""
        fields = asdict(self) | {"format": FORMAT, "version": __version__}
        plain: dict[str, Any] = json.loads(json.dumps(fields))
        return plain

    @property
    def key(self) -> str:
        """Sixteen hex digits, a digest of all fields: the name of the result's files."""
        return digest(self.subject)[:16]

    @property
    def title(self) -> str:
        """The model, recipe and seed, for people."""
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
            result = read_json(self.folder / f"{cell.key}.json")
            same = result["subject"] == cell.subject
            done = result["status"] == DONE
        except (ArtifactError, OSError, ValueError, KeyError, TypeError):
            return None
        return result if same and not (done and self.images(cell) is None) else None

    def images(self, cell: Cell) -> Tensor | None:
        """The first images of `cell`, (n, channels, height, width) in [-1, 1], at 256 levels; None
        where there are none."""
        try:
            open_regular(self.folder / f"{cell.key}.safetensors").close()
            levels = load_file(self.folder / f"{cell.key}.safetensors")["images"]
        except Exception:  # missing or damaged: safetensors has errors of its own kind
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
    """The processor, the number of threads and the version of torch that this runs with."""
    try:
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        name = None  # not Linux
    cpu = name[1] if name else platform.processor() or platform.machine()
    facts = {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
