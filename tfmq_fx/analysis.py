"""What could be done to a model, without doing it: binding times, the temporal block, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .capture import capture
from .dataflow import Binding, binding_times, temporal_block
from .pipelines import find_timestep, named_inputs


@dataclass(frozen=True, slots=True)
class Analysis:
    """The analysis of one model. `str()` is for reading, `data` (JSON-ready) for programs."""

    data: dict[str, Any]

    def __str__(self) -> str:
        d = self.data
        lines = [
            f"{d['model']}: {d['parameters']:,} parameters, {d['nodes']} nodes, "
            f"captured in {d['capture_seconds']:.1f} s",
            "binding time      nodes   parameters   share",
        ]
        for name, row in d["bindings"].items():
            share = 100 * row["parameters"] / max(d["parameters"], 1)
            lines.append(f"  {name:<14}{row['nodes']:>7}{row['parameters']:>13,}{share:>7.2f} %")
        block = d["block"]
        lines.append(
            f"temporal information block: {len(block['features'])} features, "
            f"{block['parameters']:,} parameters; {block['row_bytes']} bytes a timestep, "
            f"{block['row_bytes'] * d['steps'] / 1024:.1f} KiB for {d['steps']} steps "
            f"in place of {block['weight_bytes'] / 1024:.1f} KiB of weights"
        )
        lines += [f"  {name} {tuple(shape)}" for name, shape, _ in block["features"]]
        lines += [f"  not tabled: {site}: {reason}" for site, reason in block["declined"]]
        return "\n".join(lines)


def analyze(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timestep: str | None = None,
    conditions: Sequence[str] = (),
    steps: int = 50,
) -> Analysis:
    """Binding times of a model and what tables would save; nothing is changed or computed.

    Works on the meta device.  example_inputs, timestep: as for `prepare`.  conditions: names of
    inputs that are fixed for a request (class labels, text).  steps: K, the size of the set for
    which table bytes are told.
    """
    inputs = named_inputs(model, example_inputs)
    captured = capture(model, inputs, timestep=find_timestep(inputs, timestep))
    gm = captured.gm
    times = binding_times(gm, conditions)
    bindings = {b: {"nodes": 0, "parameters": 0} for b in Binding}
    counted: set[int] = set()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        row = bindings[times[node]]
        row["nodes"] += 1
        for parameter in _parameters(gm, node):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                row["parameters"] += parameter.numel()
    block = temporal_block(gm)
    weights = {id(p): p for path in block.modules for p in gm.get_submodule(path).parameters()}
    return Analysis(
        {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "nodes": len(gm.graph.nodes),
            "capture_seconds": captured.seconds,
            "route": captured.route,
            "guards": [f"{g.text} is {g.holds} ({g.source})" for g in captured.call.guards],
            "steps": steps,
            "bindings": {_NAMES[b]: row for b, row in bindings.items()},
            "block": {
                **block.summary(),
                "parameters": sum(p.numel() for p in weights.values()),
                "weight_bytes": sum(p.nbytes for p in weights.values()),
                "row_bytes": sum(f.width * f.dtype.itemsize for f in block.features),
            },
        }
    )


_NAMES = {
    Binding.CONSTANT: "constant",
    Binding.T: "t",
    Binding.C: "c",
    Binding.TC: "(t, c)",
    Binding.X: "x",
}


def _parameters(gm: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    """The parameters a node computes with: its module's, and those read into its arguments."""
    found = []
    if node.op == "call_module":
        found += list(gm.get_submodule(str(node.target)).parameters())
    for used in node.all_input_nodes:
        if used.op == "get_attr":
            owner, _, name = str(used.target).rpartition(".")
            value: nn.Parameter | Tensor | None = getattr(gm.get_submodule(owner), name, None)
            if isinstance(value, nn.Parameter):
                found.append(value)
    return found
