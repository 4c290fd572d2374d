"""Where the parameters of a model ended up, and what is said of weights left as floats."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping

from torch import fx, nn

from tfmq_fx.capture.outside_tensors import BAKED
from tfmq_fx.core.errors import ConfigError, CoverageWarning
from tfmq_fx.ir.graph_pass import Declined
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.module_json import tensors_of
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.source_tensors import shown

_OURS = (os.path.dirname(os.path.dirname(__file__)) + os.sep, contextlib.__file__)
_SUBSTANTIAL = 0.1  # share of the weights that may stay in floating point without a word


def parameter_record(
    gm: fx.GraphModule,
    origin: Provenance,
    source: nn.Module,
    folded: Mapping[str, Mapping[str, list[str]]],
) -> dict[str, int]:
    """How many parameters of `source` each place has: JSON-ready facts for a report.

    quantized: weights of quantized layers.  float: what is read as it was.  tables: what nothing
    reads since tables hold its results.  unused: what no call of the model reads.  constants:
    numbers of the graph that are none of the model's parameters, as its code made them or read
    them from elsewhere.
    gm: the converted graph.  folded: path of a layer -> what its weight and bias are computed from,
    by name.
    """
    used = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    integers = {n for n in used if isinstance(gm.get_submodule(n), QuantLayer)}
    kept = {name.rpartition(".")[0] for name in integers} | integers  # a layer may come in parts
    weights: dict[str, list[str]] = {}  # name of a parameter -> layers whose weight it makes
    biases = {name for path in used & set(folded) for name in folded[path]["bias"]}
    for path in used | set(folded) | kept:
        for name in folded[path]["weight"] if path in folded else [f"{path}.weight"]:
            weights.setdefault(name, []).append(path)
    for gone, serving in origin.merged.items():
        weights.setdefault(f"{gone}.weight", []).append(serving)
    present, baked = {*tensors_of(gm)}, {*gm.meta.get(BAKED, ())}
    found = dict.fromkeys(("model", "quantized", "float", "tables", "unused", "constants"), 0)
    names: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        sizes[id(parameter)] = parameter.numel()

    def place(name: str) -> str:
        layers = weights.get(name, [])
        if any(path in integers or f"{path}." in _prefixes(integers) for path in layers):
            return "quantized"
        owner = origin.merged.get(name.rpartition(".")[0], name.rpartition(".")[0])
        if (
            name in present
            or name in baked
            or name in biases
            or owner in used
            or any(path in used for path in layers)
        ):
            return "float"
        return "tables" if name in origin.fingerprints else "unused"

    order = ("quantized", "float", "tables", "unused")
    for key, size in sizes.items():
        found[min(map(place, names[key]), key=order.index)] += size
        found["model"] += size
    found["constants"] = sum(value.numel() for value in origin.constants.values())
    return found


def _prefixes(paths: set[str]) -> set[str]:
    return {f"{path.rpartition('.')[0]}." for path in paths}


def check_coverage(quantized: int, left: Mapping[str, int], declined: list[Declined]) -> None:
    """Warn where a substantial part of a model's weights stays in floating point, naming modules.

    quantized: how many weights are integers.  left: how many are not though a recipe asks for
    it, by module.  Raises ConfigError where none are.
    """
    total = sum(left.values())
    if not total or total < _SUBSTANTIAL * (total + quantized):
        return
    reasons = {d.site: d.reason for d in declined}
    largest = sorted(left, key=left.__getitem__, reverse=True)
    why = [f"{n} ({reasons.get(n, 'no convolution or linear layer')})" for n in largest]
    if not quantized:
        raise ConfigError(
            f"nothing of this model can be quantized: {shown(why)}. Take off what was put on its "
            "layers before prepare() (hooks, replaced forwards), compute weights from parameters "
            'alone, or prepare it with config="fp", which makes tables and nothing else'
        )
    warnings.warn(
        f"{total} of {total + quantized} weights stay in floating point: {shown(why)}. "
        "report(model) names all of them",
        CoverageWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """How far up the stack, seen from the caller of this, code outside this package is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level
