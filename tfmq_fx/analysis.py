"""What could be done to a model, without doing it: binding times, the temporal block, bytes."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from .boxes import NAMES, plain_ops
from .capture import Captured, capture
from .dataflow import Binding, BindingTimes, TemporalBlock, binding_times, temporal_block
from .dataflow import temporal_cut as minimum_cut
from .drawing import Drawing, number
from .errors import ConfigError, InputError
from .flops import node_flops
from .graph import module_path, timestep_node
from .ops import is_heavy
from .pipelines import TIMESTEP_NAMES, find_timestep, named_inputs
from .regions import extract_nodes
from .signature import CallSpec, Input
from .skeletons import skeleton

_STEPWISE = ("residual", "block_samples")  # what another network computes anew at every step
_LISTED = 40  # features named one by one; more are counted by kind


@dataclass(frozen=True, slots=True)
class Analysis:
    """The analysis of one model. `str()` is for reading, `data` (JSON-ready) for programs.

    drawing: the graph as plain data; the model is not kept.
    """

    data: dict[str, Any]
    drawing: Drawing

    def dot(self, depth: int = 2) -> str:
        """Graphviz text. depth: parts of the module paths drawn; deeper modules are in a box."""
        return self.drawing.dot(_checked_depth(depth))

    def svg(self, depth: int = 2) -> str:
        """A self-contained SVG picture of the modules down to `depth`."""
        return self.drawing.svg(_checked_depth(depth))

    def save(self, path: str | Path, depth: int = 2) -> None:
        """Write what the suffix says: .json, .txt, .dot or .svg. The file appears complete."""
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
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
                made = Path(folder) / path.name
                made.write_text(text, encoding="utf-8")
                os.replace(made, path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from error

    def __str__(self) -> str:
        return "\n".join([*self._head(), *self._block(), *self._conditioned()])

    def _head(self) -> list[str]:
        d = self.data
        lines = [
            f"{d['model']}: {d['parameters']:,} parameters, {d['nodes']} nodes, "
            f"captured in {d['capture_seconds']:.1f} s",
            "inputs:",
        ]
        lines += [
            f"  {each['path']} {_tuple(each['shape'])}: {each['binding']}" for each in d["inputs"]
        ]
        lines.append("binding time      nodes   parameters   share       FLOPs   share")
        for name, row in d["bindings"].items():
            weights = 100 * row["parameters"] / max(d["parameters"], 1)
            work = 100 * row["flops"] / max(d["flops"], 1)
            lines.append(
                f"  {name:<14}{row['nodes']:>7}{row['parameters']:>13,}{weights:>7.2f} %"
                f"{number(row['flops']):>10}{work:>7.3g} %"
            )
        lines.append(
            f"  FLOPs of one call with a batch of {d['batch']}: {number(d['flops'], 'FLOPs')}"
        )
        if d["unused_parameters"]:
            lines.append(f"  parameters that no call uses: {d['unused_parameters']:,}")
        return lines

    def _block(self) -> list[str]:
        d, block = self.data, self.data["block"]
        lines = [
            f"temporal information block: {len(block['features'])} features, "
            f"{block['parameters']:,} parameters; {block['row_bytes']} bytes a timestep, "
            f"{_kib(block['table_bytes'])} for {d['steps']} steps "
            f"in place of {_kib(block['weight_bytes'])} of weights; "
            f"saves {number(block['flops_saved'], 'FLOPs')} in {d['steps']} steps"
        ]
        shared = set(block["shared"])
        if len(block["features"]) > _LISTED:
            lines += _by_kind((name, shape) for name, shape, _ in block["features"])
        else:
            for name, shape, _ in block["features"]:
                own = [m for m in block["uses"][name] if m not in shared and m != name]
                more = f", with {', '.join(own)}" if own else ""
                lines.append(f"  {name} {_tuple(shape)}{more}")
        if shared:
            lines.append(f"  shared by several: {', '.join(block['shared'])}")
        return lines + [f"  not tabled: {site}: {reason}" for site, reason in block["declined"]]

    def _conditioned(self) -> list[str]:
        d, part = self.data, self.data["conditioned"]
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
                total = f", {_kib(row['bytes'])} for {d['steps']} steps" if "t" in name else ""
                lines.append(
                    f"  from {what}: {len(row['features'])} values, "
                    f"{_kib(row['row_bytes'])} in fp16 for each {each}{total}"
                )
                lines += ["  " + line for line in _by_kind((n, s) for n, s, _ in row["features"])]
        if any(row["features"] for row in part["rows"].values()):
            share = 100 * part["parameters"] / max(d["parameters"], 1)
            lines.append(
                f"  in place of {part['parameters']:,} parameters ({share:.2f} %) and "
                f"{number(part['flops'], 'FLOPs')} a call"
            )
        else:
            lines.append("  nothing heavy depends on them and the timestep alone")
        return lines


def analyze(
    model: nn.Module | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timestep: str | None = None,
    conditions: Sequence[str] | None = None,
    steps: int = 50,
) -> Analysis:
    """Binding times of a model and what tables would save; nothing is changed or computed.

    model: a module, on the meta device too; or the path of a diffusers config or model directory,
    of which no weights are read.  example_inputs, timestep: as for `prepare`.  conditions: inputs
    that are fixed for a request (class labels, text), by name, dotted path or placeholder; left
    out, all but the sample, the timestep and what another network adds at every step.  steps: K,
    the size of the set for which bytes and operations are told.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be a whole number of at least 1, got {steps!r}")
    if isinstance(model, (str, Path)):
        model = skeleton(model)
    inputs = named_inputs(model, example_inputs)
    captured = capture(model, inputs, timestep=find_timestep(inputs, timestep))
    gm, call = captured.gm, captured.call
    times = binding_times(gm, _conditions(call, conditions))
    shapes = _shapes(captured, inputs)
    flops = node_flops(gm, shapes)
    owners = _owners(gm, times)
    sizes: Counter[fx.Node] = Counter()
    for first, parameter, _ in owners:
        sizes[first] += parameter.numel()
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
    features: dict[fx.Node, str] = {feature.node: feature.name for feature in block.features}
    data = {
        "model": type(model).__name__,
        "parameters": parameters,
        "nodes": len(gm.graph.nodes),
        "capture_seconds": captured.seconds,
        "route": captured.route,
        "guards": [f"{g.text} is {g.holds} ({g.source})" for g in call.guards],
        "steps": steps,
        "batch": shapes[call.names.index(call.timestep)][0],
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
        "block": _block(gm, block, owners, flops, steps),
        "conditioned": _conditioned(gm, times, rows, steps),
    }
    ops = plain_ops(gm, times, sizes, flops, features)
    return Analysis(data, Drawing(type(model).__name__, ops))


# ---------------------------------------------------------------------------- inputs


def _conditions(call: CallSpec, names: Sequence[str] | None) -> list[str]:
    """Placeholders of the inputs that are fixed for a request, named or all that may be."""
    others = [spec for spec in call.inputs if spec.name != call.timestep]
    if names is None:
        sample = _sample(call, others)
        return [
            spec.name
            for spec in others
            if _argument(spec) != sample
            and _argument(spec) not in TIMESTEP_NAMES
            and not any(word in spec.path for word in _STEPWISE)
        ]
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        named = [
            spec.name
            for spec in others
            if name in (spec.name, spec.path) or spec.path.startswith(f"{name}.")
        ]
        if not named:
            paths = ", ".join(spec.path for spec in others) or "none"
            raise ConfigError(f"no input {name!r} for a condition; choose from {paths}")
        found |= dict.fromkeys(named)
    return list(found)


def _argument(spec: Input) -> str:
    return spec.path.split(".")[0]


def _sample(call: CallSpec, others: Sequence[Input]) -> str:
    """The argument that holds the sample: of tensors (no lists) the first image, else the one with
    most dimensions; else the first argument."""
    tensors = [spec for spec in others if spec.path == _argument(spec)]
    images = [spec for spec in tensors if len(spec.shape) >= 4]
    ranked = images or sorted(tensors, key=lambda spec: -len(spec.shape)) or others
    return _argument(ranked[0]) if ranked else ""


def _shapes(captured: Captured, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of the example inputs; those of the capture, where the graph is not for them (a
    batch of one, which capture doubles, and a model that treats it apart)."""
    try:
        values = captured.call.bind((), dict(inputs))[0]
    except InputError:
        values = [node.meta["val"] for node in captured.gm.graph.find_nodes(op="placeholder")]
    return [
        tuple(n if isinstance(n, int) else n.node.hint for n in value.shape) for value in values
    ]


# ---------------------------------------------------------------------------- parameters

_NO_WORK = ("placeholder", "output", "get_attr")
Owner = tuple[fx.Node, nn.Parameter, Binding]


def _owners(gm: fx.GraphModule, times: BindingTimes) -> list[Owner]:
    """Each parameter once: the node that uses it first, and the latest binding time that does.

    A constant made from parameters by light operations (a position table, reshaped) is no work
    saved, so its parameters count where the constant is used.
    """
    carried: dict[fx.Node, list[nn.Parameter]] = {}
    found: dict[int, Owner] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(gm, str(node.target))
            carried[node] = [value] if isinstance(value, nn.Parameter) else []
            continue
        used = [p for source in node.all_input_nodes for p in carried.get(source, ())]
        if node.op == "call_module":
            used += gm.get_submodule(str(node.target)).parameters()
        elif times[node] is Binding.CONSTANT and node.op != "output" and not is_heavy(gm, node):
            carried[node] = used
            continue
        for parameter in used:
            first, _, binding = found.get(id(parameter), (node, parameter, times[node]))
            found[id(parameter)] = (first, parameter, binding.join(times[node]))
    return list(found.values())


def _attribute(gm: fx.GraphModule, path: str) -> Tensor | None:
    owner, _, name = path.rpartition(".")
    value: Tensor | None = getattr(gm.get_submodule(owner), name, None)
    return value


# ---------------------------------------------------------------------------- what is saved


def _block(
    gm: fx.GraphModule,
    block: TemporalBlock,
    owners: Sequence[Owner],
    flops: Mapping[fx.Node, int],
    steps: int,
) -> dict[str, Any]:
    cut = [feature.node for feature in block.features]
    inside = extract_nodes(gm, cut, [timestep_node(gm)])
    dropped = [p for node, p, binding in owners if binding <= Binding.T and node in inside]
    row = sum(f.width * f.dtype.itemsize for f in block.features)
    return {
        **block.summary(),
        "uses": {name: list(modules) for name, modules in block.uses.items()},
        "parameters": sum(p.numel() for p in dropped),
        "weight_bytes": sum(p.nbytes for p in dropped),
        "row_bytes": row,
        "table_bytes": row * steps,
        "flops_saved": steps * sum(flops.get(node, 0) for node in inside),
    }


def _conditioned(
    gm: fx.GraphModule, times: BindingTimes, bindings: Mapping[str, dict[str, int]], steps: int
) -> dict[str, Any]:
    """What would be stored, in fp16, were the conditions fixed as well as the timesteps."""
    early = (Binding.T, Binding.C, Binding.TC)
    cut = minimum_cut(gm, times, upto=Binding.TC) if times.conditions else ()
    rows: dict[str, Any] = {}
    for binding in early:
        features = [
            [_producer(node), list(node.meta["val"].shape[1:]), NAMES[times[node]]]
            for node in cut
            if times[node] is binding
        ]
        row = sum(2 * _numel(shape) for _, shape, _ in features)
        repeated = 1 if binding is Binding.C else steps
        rows[NAMES[binding]] = {"features": features, "row_bytes": row, "bytes": row * repeated}
    return {
        "conditions": sorted(times.conditions),
        "rows": rows,
        "parameters": sum(bindings[NAMES[b]]["parameters"] for b in early),
        "flops": sum(bindings[NAMES[b]]["flops"] for b in early),
    }


def _numel(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _producer(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else module_path(node) or node.name


# ---------------------------------------------------------------------------- words


def _checked_depth(depth: int) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"depth must be a whole number of at least 1, got {depth!r}")
    return depth


def _kib(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1 << 24 else f"{count / (1 << 20):.1f} MiB"


def _tuple(shape: Iterable[int | str]) -> str:
    sizes = [str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _by_kind(features: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    """One line for all features whose names differ in their numbers only and that have one shape:
    "blocks.*.modulation (192,), 28 times"."""
    kinds = Counter((re.sub(r"(?<=\.)\d+", "*", name), tuple(shape)) for name, shape in features)
    return [
        f"  {name} {shape}" + (f", {count} times" if count > 1 else "")
        for (name, shape), count in kinds.items()
    ]
