"""Capture every architecture of the tests, and write the table in docs/models.md.

    python -m tests.bench.capture_models                     all of them, about 8 minutes
    python -m tests.bench.capture_models --only sdxl flux-dev      print these rows

Exactness is measured on the reduced models, in float32 and bfloat16, at a batch and, where it is
free, at a resolution that capture never saw; time and size on the published ones, on the meta
device (no weights in memory), with the batch free.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import handwritten, test_handwritten, zoo
from tests.capture.test_architectures import LISTS_OF_SAMPLES, ONE_RESOLUTION, free_sizes
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.capture.inputs import find_timestep
from tfmq_fx.capture.nested_values import outline
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.ir.temporal_block import temporal_block

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- the table below is written by a command -->\n", "<!-- end of the table -->\n"
COLUMNS = """model | parameters, M | route | nodes | seconds | difference fp32, bf16 | resolution |
 layers of t alone | guards at a free resolution""".replace("\n", "").split(" | ")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to capture. inputs: (model, batch, scale of the resolution) -> arguments of forward.

    free: the sizes to free, of the reduced model.  fixed: why the resolution cannot be, or "".
    batches: whether the batch can be another than at capture.
    """

    title: str
    reduced: Callable[[torch.dtype], nn.Module]
    full: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int, int], dict[str, Any]]
    free: Callable[[nn.Module], Any]
    fixed: str
    batches: bool = True


def subjects() -> Iterator[Subject]:
    for name in zoo.ENTRIES:
        yield Subject(
            title=name,
            reduced=lambda dtype, name=name: zoo.model(name, dtype=dtype),
            full=lambda name=name: zoo.model(name, full=True, device="meta"),
            inputs=lambda m, batch, scale, name=name: zoo.inputs(name, m, batch, scale),
            free=lambda model, name=name: free_sizes(name, model),
            fixed=ONE_RESOLUTION.get(name, ""),
            batches=name not in LISTS_OF_SAMPLES,
        )
    for name, title, full in (
        ("openai", "openaimodel UNet, SD 1", handwritten.STABLE_DIFFUSION_1),
        ("guided", "guided-diffusion UNet, ADM 64", handwritten.ADM_64),
        ("ddim", "DDIM UNet, CIFAR-10", handwritten.DDPM_CIFAR10),
    ):
        yield Subject(
            title=title,
            reduced=lambda dtype, name=name: handwritten_model(name, dtype),
            full=lambda name=name, full=full: on_meta(name, full),
            inputs=handwritten_inputs,
            free=lambda model, name=name: test_handwritten.CASES[name][2],
            fixed="asserts it" if name == "ddim" else "",
        )


def handwritten_model(name: str, dtype: torch.dtype) -> nn.Module:
    kind, options, _ = test_handwritten.CASES[name]
    return test_handwritten.build(kind, options).to(dtype).eval()


def on_meta(name: str, options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return test_handwritten.CASES[name][0](**options).eval()


def handwritten_inputs(model: nn.Module, batch: int, scale: int) -> dict[str, Any]:
    weight = next(model.parameters())
    large = weight.is_meta
    side = (
        8 * scale
        if not large
        else {"OpenAIUNet": 64, "GuidedUNet": 64, "DDIMUNet": 32}[type(model).__name__]
    )
    found = test_handwritten.inputs(model, batch, (side, side))
    if large and "OpenAIUNet" in type(model).__name__:
        found["context"] = torch.randn(batch, 77, 768)
    found[test_handwritten.clock(model)] = torch.arange(batch) * 300
    return {k: v.to(weight if v.is_floating_point() else weight.device) for k, v in found.items()}


@torch.no_grad()
def difference(model: nn.Module, captured: Captured, inputs: dict[str, Any]) -> float:
    """The largest difference between graph and model."""
    values, return_dict = captured.call.bind((), inputs)
    found = captured.call.rebuild(captured.gm(*values), return_dict)
    pairs = zip(outline(found)[1], outline(model(**inputs))[1], strict=True)
    return max(float((a.double() - b.double()).abs().max()) for (_, a), (_, b) in pairs)


def row(subject: Subject) -> list[str]:
    differences, guards = [], ""
    for dtype in (torch.float32, torch.bfloat16):
        model = subject.reduced(dtype)
        example = subject.inputs(model, 2, 1)
        timestep = find_timestep(example, None)
        try:
            with torch.no_grad():
                model(**example)
        except RuntimeError:
            differences.append("(eager fails)")
            continue
        graph = capture(model, example, timestep=timestep, dynamic=subject.free(model))
        other = subject.inputs(model, 3 if subject.batches else 2, 1 if subject.fixed else 2)
        differences.append(f"{difference(model, graph, other):g}")
        texts = [g.text if g.holds else f"not {g.text}" for g in graph.call.guards]
        guards = guards or ", ".join(dict.fromkeys(texts))
    model = subject.full()
    captured = capture(model, subject.inputs(model, 2, 1), timestep=timestep)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return [
        subject.title,
        f"{parameters:,.0f}",
        captured.route,
        f"{len(captured.gm.graph.nodes):,}",
        f"{captured.seconds:.1f}",
        ", ".join(differences),
        ("as captured: " + subject.fixed if subject.fixed else "free")
        + ("" if subject.batches else "; so is the batch"),
        str(len(temporal_block(captured.gm).modules)),
        guards or "none",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="print the rows of these models")
    only = parser.parse_args().only
    chosen = [subject for subject in subjects() if not only or subject.title in only]
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [row(subject) for subject in progress_bar(chosen, "capture", enabled=True)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    print(table)
    if only:
        return
    where = (
        f"`python -m tests.bench.capture_models`, {os.cpu_count()} cores "
        f"({platform.processor() or platform.machine()}), torch {torch.__version__}, "
        f"{datetime.date.today()}:\n\n"
    )
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    text = f"{before}{BEGIN}\n{where}{table}\n{END}{rest.partition(END)[2]}"
    temporary = DOCUMENT.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, DOCUMENT)


if __name__ == "__main__":
    main()
