"""Count where the parameters of a model ended up, and warn about weights left in floating point."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping

from torch import fx, nn

from tfmq_fx.capture.outside_tensors import BAKED
from tfmq_fx.core.errors import ConfigError, CoverageWarning
from tfmq_fx.ir.graph import OPAQUE, opaque_modules
from tfmq_fx.ir.graph_pass import Declined
from tfmq_fx.ir.opaque_layers import inner_sites
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.module_json import tensors_of
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.source_tensors import shown

_OURS = (os.path.dirname(os.path.dirname(__file__)) + os.sep, contextlib.__file__)
_SUBSTANTIAL = 0.1  # share of the weights in floating point from which there is a warning


def parameter_record(
    gm: fx.GraphModule,
    origin: Provenance,
    source: nn.Module,
    folded: Mapping[str, Mapping[str, list[str]]],
) -> dict[str, int]:
    """The number of parameters of `source` by place, as JSON-ready facts for a report.

    quantized: weights of quantized layers.  float: parameters read as they were.  tables: those
    whose results tables hold.  unused: those that no call of the model reads.  constants: numbers
    in the graph that are no parameters of the model, but made by its code or read from elsewhere.
    gm: the converted graph.  folded: path of a layer -> "weight" and "bias" -> the names of the
    parameters from which they are computed.
    """
    used = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    integers = {n for n in used if isinstance(gm.get_submodule(n), QuantLayer)}
    integers |= {s.name for s in inner_sites(gm)[0] if isinstance(s.layer, QuantLayer)}
    quantized = {name.rpartition(".")[0] for name in integers} | integers  # parts of a layer, too
    weights: dict[str, list[str]] = {}  # name of a parameter -> layers whose weight it makes
    biases = {name for path in used & set(folded) for name in folded[path]["bias"]}
    for path in used | set(folded) | quantized:
        for name in folded[path]["weight"] if path in folded else [f"{path}.weight"]:
            weights.setdefault(name, []).append(path)
    for gone, serving in origin.merged.items():
        weights.setdefault(f"{gone}.weight", []).append(serving)
    read = {*tensors_of(gm), *gm.meta.get(BAKED, ()), *biases}
    counts = dict.fromkeys(("model", "quantized", "float", "tables", "unused", "constants"), 0)
    names: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        sizes[id(parameter)] = parameter.numel()

    def place(name: str) -> str:
        layers = weights.get(name, [])
        if quantized.intersection(layers):
            return "quantized"
        layer = name.rpartition(".")[0]
        owner = origin.merged.get(layer, layer)
        if name in read or used.intersection((owner, *layers)):
            return "float"
        return "tables" if name in origin.fingerprints else "unused"

    order = ("quantized", "float", "tables", "unused")
    for key, size in sizes.items():
        counts[min(map(place, names[key]), key=order.index)] += size
        counts["model"] += size
    counts["constants"] = sum(value.numel() for value in origin.constants.values())
    return counts


def opaque_declined(gm: fx.GraphModule) -> list[Declined]:
    """Why opaque modules have weights that are not quantized, and which of their layers."""
    modules = [
        Declined(path, f"opaque, has matrices of its own: {gm.meta[OPAQUE][path]}")
        for path, module in opaque_modules(gm).items()
        if any(parameter.dim() > 1 for parameter in module.parameters())
    ]
    return [*modules, *inner_sites(gm)[1]]


def check_coverage(quantized: int, left: Mapping[str, int], declined: list[Declined]) -> None:
    """Warn where a substantial part of a model's weights stays in floating point, naming modules.

    quantized: the number of integer weights.  left: the number of weights that a recipe failed to
    quantize, by module.  Raises ConfigError where there are no integer weights.
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
    """The stack level of the first caller outside this package, for `warnings.warn`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level
