"""Analyze a model without changing it: binding times, the temporal block, bytes and operations."""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from tfmq_fx.capture.call_inference import Dynamic
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.capture.inputs import find_timestep, named_inputs
from tfmq_fx.core.arguments import check_dynamic, check_many, check_whole
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.files import write_whole
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.ir.binding_times import Binding, BindingTimes, binding_times
from tfmq_fx.ir.graph import opaque_modules
from tfmq_fx.ir.node_info import is_heavy
from tfmq_fx.ir.subgraphs import extract_nodes
from tfmq_fx.ir.temporal_block import TemporalBlock, producer, temporal_block, temporal_cut
from tfmq_fx.passes.merge_duplicates import merge_duplicates

from .analysis_text import summary
from .flops import node_flops
from .graph_boxes import NAMES, plain_ops
from .graph_drawing import Drawing
from .meta_model import meta_model


@dataclass(frozen=True, slots=True)
class Analysis:
    """The analysis of one model. `str()` is for reading, `data` (JSON-ready) for programs.

    drawing: the graph as plain data; the model is not kept.
    """

    data: dict[str, Any]
    drawing: Drawing

    def dot(self, depth: int = 2) -> str:
        """Graphviz text of the graph.

        depth: parts of the module paths drawn; deeper modules are in a box.
        """
        check_whole(depth, "depth", 1)
        return self.drawing.dot(depth)

    def svg(self, depth: int = 2) -> str:
        """A self-contained SVG picture of the modules down to `depth`."""
        check_whole(depth, "depth", 1)
        return self.drawing.svg(depth)

    def save(self, path: str | Path, depth: int = 2) -> None:
        """Write the analysis as the suffix says: .json, .txt, .dot or .svg. The file appears
        complete."""
        write: dict[str, Callable[[], str]] = {
            ".json": lambda: json.dumps(self.data, indent=2) + "\n",
            ".txt": lambda: f"{self}\n",
            ".dot": lambda: self.dot(depth),
            ".svg": lambda: self.svg(depth),
        }
        path = Path(path)
        if path.suffix not in write:
            raise ConfigError(f"{path}: the name must end in one of {', '.join(write)}")
        text = write[path.suffix]()
        try:
            write_whole(path, text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from error

    def __str__(self) -> str:
        return summary(self.data)


@outside_inference_mode
def analyze(
    model: nn.Module | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timestep: str | None = None,
    dynamic: Dynamic | None = None,
    conditions: Sequence[str] | None = None,
    steps: int = 50,
) -> Analysis:
    """Find the binding times of a model and what tables would save; nothing is changed or computed.

    model: a module, on the meta device too; or the path of a diffusers config or model directory,
    of which no weights are read.  example_inputs, timestep, dynamic: as for `prepare`, but that the
    batch alone is free where dynamic is left out, which is quicker.  conditions: inputs
    that are fixed for a request (class labels, text), by name, dotted path or placeholder; left
    out, all but the sample, the timestep and what another network adds at every step.  steps: K,
    the size of the set for which bytes and operations are counted.
    """
    check_whole(steps, "steps", 1)
    check_many(conditions, "conditions", "names")
    if isinstance(model, (str, Path)):
        model = meta_model(model)
    inputs = named_inputs(model, example_inputs)
    check_dynamic(dynamic)
    captured = capture(
        model,
        inputs,
        timestep=find_timestep(inputs, timestep),
        dynamic=("batch",) if dynamic is None else dynamic,
    )
    gm, call = merge_duplicates(captured.gm).gm, captured.call
    times = binding_times(gm, call.named_conditions(conditions))
    opaque = opaque_modules(gm)  # whose results are known at the sizes of the capture
    shapes = _shapes(captured, {} if opaque else inputs)
    flops = node_flops(gm, shapes)
    owners = _owners(gm, times)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    sizes: Counter[fx.Node] = Counter()
    for users, parameter, _ in owners:
        sizes[min(users, key=position.__getitem__)] += parameter.numel()
    block = temporal_block(gm)
    parameters = sum(p.numel() for p in model.parameters())
    rows = {
        NAMES[b]: {
            "nodes": sum(n.op not in _NO_WORK and times[n] is b for n in gm.graph.nodes),
            "parameters": sum(p.numel() for _, p, binding in owners if binding is b),
            "bytes": sum(p.nbytes for _, p, binding in owners if binding is b),
            "flops": sum(n for node, n in flops.items() if times[node] is b),
        }
        for b in Binding
    }
    data = {
        "model": type(model).__name__,
        "parameters": parameters,
        "nodes": len(gm.graph.nodes),
        "capture_seconds": captured.seconds,
        "route": captured.route,
        "opaque": [*opaque],
        "guards": [f"{g.text} is {g.holds} ({g.source})" for g in call.guards],
        "steps": steps,
        "batch": shapes[call.timestep_position][0],
        "inputs": [
            {
                "name": spec.name,
                "path": spec.path,
                "shape": list(spec.shape),
                "binding": NAMES[times[node]],
            }
            for spec, node in zip(call.inputs, gm.graph.find_nodes(op="placeholder"), strict=True)
        ],
        "flops": sum(flops.values()),
        "unused_parameters": parameters - sum(sizes.values()),
        "bindings": rows,
        "block": _block_facts(gm, block, owners, flops, steps),
        "conditioned": {
            "conditions": [spec.path for spec in call.inputs if spec.name in times.conditions],
            **_conditioned(gm, times, owners, flops, steps),
        },
    }
    features = {feature.node: feature.name for feature in block.features}
    ops = plain_ops(gm, times, sizes, flops, features)
    return Analysis(data, Drawing(type(model).__name__, ops))


# ---------------------------------------------------------------------------- inputs


def _shapes(captured: Captured, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of the example inputs, or those of the capture where the graph does not take them
    (a batch of one, which capture doubles, and a model that treats it apart)."""
    try:
        values = captured.call.bind((), dict(inputs))[0]
    except InputError:
        values = [node.meta["val"] for node in captured.gm.graph.find_nodes(op="placeholder")]
    return [
        tuple(n if isinstance(n, int) else n.node.hint for n in value.shape) for value in values
    ]


# ---------------------------------------------------------------------------- parameters

_NO_WORK = ("placeholder", "output", "get_attr")
Owner = tuple[frozenset[fx.Node], nn.Parameter, Binding]


def _owners(gm: fx.GraphModule, times: BindingTimes) -> list[Owner]:
    """Each parameter once, with the nodes that use it, and the latest binding time among them.

    A constant made from parameters by light operations (a position table, reshaped) is no work
    saved, so its parameters count where the constant is used.
    """
    carried: dict[fx.Node, list[nn.Parameter]] = {}
    owners: dict[int, Owner] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(gm)
            carried[node] = [value] if isinstance(value, nn.Parameter) else []
            continue
        used = [p for source in node.all_input_nodes for p in carried.get(source, ())]
        if node.op == "call_module":
            used += gm.get_submodule(str(node.target)).parameters()
        elif times[node] is Binding.CONSTANT and node.op != "output" and not is_heavy(gm, node):
            carried[node] = used
            continue
        for parameter in used:
            users, _, binding = owners.get(id(parameter), (frozenset(), parameter, times[node]))
            owners[id(parameter)] = (users | {node}, parameter, binding.join(times[node]))
    return list(owners.values())


# ---------------------------------------------------------------------------- what is saved


def _block_facts(
    gm: fx.GraphModule,
    block: TemporalBlock,
    owners: Sequence[Owner],
    flops: Mapping[fx.Node, int],
    steps: int,
) -> dict[str, Any]:
    """The facts about the temporal block: its features, and what their table takes and saves."""
    left = _left(gm, [feature.node for feature in block.features])
    dropped = [p for users, p, _ in owners if not users & left]
    row = sum(f.width * f.dtype.itemsize for f in block.features)
    return {
        **block.summary(),
        "uses": {name: list(modules) for name, modules in block.uses.items()},
        "parameters": sum(p.numel() for p in dropped),
        "weight_bytes": sum(p.nbytes for p in dropped),
        "row_bytes": row,
        "table_bytes": row * steps,
        "flops_saved": steps * sum(n for node, n in flops.items() if node not in left),
    }


def _conditioned(
    gm: fx.GraphModule,
    times: BindingTimes,
    owners: Sequence[Owner],
    flops: Mapping[fx.Node, int],
    steps: int,
) -> dict[str, Any]:
    """The values that tables would hold, in fp16, if the conditions were fixed too, and the
    parameters and operations that a step would do without."""
    cut = temporal_cut(gm, times, upto=Binding.TC)[0] if times.conditions else ()
    left = _left(gm, cut)
    rows: dict[str, Any] = {}
    for binding in (Binding.T, Binding.C, Binding.TC):
        features = [
            [producer(node) or node.name, list(node.meta["val"].shape[1:])]
            for node in cut
            if times[node] is binding
        ]
        row = sum(2 * math.prod(shape) for _, shape in features)
        repeated = 1 if binding is Binding.C else steps
        rows[NAMES[binding]] = {"features": features, "row_bytes": row, "bytes": row * repeated}
    return {
        "rows": rows,
        "parameters": sum(p.numel() for users, p, _ in owners if not users & left),
        "flops": sum(n for node, n in flops.items() if node not in left),
    }


def _left(gm: fx.GraphModule, stored: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes still computed in every call when the values of `stored` are known."""
    known = [*gm.graph.find_nodes(op="placeholder"), *stored]
    return set(extract_nodes(gm, list(gm.graph.find_nodes(op="output")), known))
