"""Print the analysis of a model: binding times, the temporal block, conditions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .graph_drawing import number

_LISTED = 24  # features named one by one; more are counted by kind


def summary(data: Mapping[str, Any]) -> str:
    """Aligned text from the data of an Analysis."""
    return "\n".join([*_head(data), *_block(data), *_conditioned(data)])


def _head(d: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{d['model']}: {d['parameters']:,} parameters, {d['nodes']} nodes, "
        f"captured in {d['capture_seconds']:.1f} s",
        "inputs:",
    ]
    lines += [
        f"  {each['path']} {_tuple(each['shape'])}: {each['binding']}" for each in d["inputs"]
    ]
    lines.append("binding time   nodes       parameters     share         FLOPs     share")
    for name, row in d["bindings"].items():
        lines.append(
            f"  {name:<11}{row['nodes']:>7}{row['parameters']:>17,}"
            f"{_share(row['parameters'], d['parameters']):>10}"
            f"{number(row['flops']):>14}{_share(row['flops'], d['flops']):>10}"
        )
    lines.append(
        f"  one call with a batch of {d['batch']}: {number(d['flops'], 'FLOPs')}, "
        "two for each multiply-add"
    )
    if d["opaque"]:
        lines.append(f"  not counted, as their code depends on data: {', '.join(d['opaque'])}")
    if d["unused_parameters"]:
        lines.append(f"  parameters that no call uses: {d['unused_parameters']:,}")
    return lines


def _block(d: Mapping[str, Any]) -> list[str]:
    block, steps = d["block"], d["steps"]
    if not block["features"]:
        lines = ["temporal information block: none, no layer depends on the timestep alone"]
    else:
        lines = [
            f"temporal information block: {_many(len(block['features']), 'feature')}, "
            f"{block['parameters']:,} parameters",
            f"  {_bytes(block['row_bytes'])} a timestep, {_bytes(block['table_bytes'])} for "
            f"{steps} steps, in place of {_bytes(block['weight_bytes'])} of weights; "
            f"saves {number(block['flops_saved'], 'FLOPs')} in {steps} steps",
        ]
    shared = set(block["shared"])
    if len(block["features"]) > _LISTED:
        lines += _by_kind((name, shape) for name, shape, _ in block["features"])
    else:
        for name, shape, _ in block["features"]:
            own = [m for m in block["uses"][name] if m not in shared and m != name]
            lines.append(f"  {name} {_tuple(shape)}{', with ' if own else ''}{', '.join(own)}")
    if shared:
        lines.append(f"  shared by several: {', '.join(block['shared'])}")
    return lines + [f"  not tabled: {site}: {reason}" for site, reason in block["declined"]]


def _conditioned(d: Mapping[str, Any]) -> list[str]:
    part, steps = d["conditioned"], d["steps"]
    if not part["conditions"]:
        return []
    lines = [f"fixed for a request: {', '.join(part['conditions'])}"]
    for name, what, each in (
        ("t", "the timestep alone", "step"),
        ("c", "these alone", "request"),
        ("(t, c)", "these and the timestep", "step and request"),
    ):
        row = part["rows"][name]
        if row["features"]:
            total = f", {_bytes(row['bytes'])} for {steps} steps" if "t" in name else ""
            lines.append(
                f"  from {what}: {_many(len(row['features']), 'value')}, "
                f"{_bytes(row['row_bytes'])} in fp16 for each {each}{total}"
            )
            lines += [f"  {line}" for line in _by_kind(row["features"])]
    if any(row["features"] for row in part["rows"].values()):
        lines.append(
            f"  with these stored, a step does without {part['parameters']:,} parameters "
            f"({_share(part['parameters'], d['parameters'])}) and "
            f"{number(part['flops'], 'FLOPs')}"
        )
    else:
        lines.append("  no layer depends on them and the timestep alone")
    return lines


def _share(part: int, whole: int) -> str:
    share = 100 * part / max(whole, 1)
    return f"{share:.2f} %" if share >= 0.01 or not part else f"{share:.0e} %"


def _bytes(count: int) -> str:
    if count < 1 << 20:
        return f"{count} bytes" if count < 1 << 10 else f"{count / (1 << 10):.1f} KiB"
    return f"{count / (1 << 20):.2f} MiB"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _tuple(shape: Iterable[int | str]) -> str:
    sizes = [str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _by_kind(features: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    """Lines that count features of one shape whose names differ in their numbers only, such as
    "blocks.*.modulation (192,), 28 times"."""
    kinds = Counter((re.sub(r"(?<=\.)\d+", "*", name), tuple(shape)) for name, shape in features)
    return [
        f"  {name} {shape}" + (f", {count} times" if count > 1 else "")
        for (name, shape), count in kinds.items()
    ]
