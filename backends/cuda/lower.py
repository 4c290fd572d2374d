"""Lower quantized layers of a graph on CUDA to the kernels of this package.

y = conv_q(x, s)    ->    y = conv(quantize_input(x, s), s): codes computed apart, so that they can
be fused into what computes x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

from tfmq_fx.affine import dynamic_scale, symmetric_steps
from tfmq_fx.backends.float_layer import FloatLayer
from tfmq_fx.backends.torchao import to_torchao, torchao_obstacle
from tfmq_fx.dialect import Stage
from tfmq_fx.graph import Declined, Rewrite, graph_pass
from tfmq_fx.kernels import obstacle
from tfmq_fx.layers import buffer_before, call_before, layer_input
from tfmq_fx.nn import QuantConv, QuantLayer, QuantLinear
from tfmq_fx.ops import size_hint

from .fuse import fuse
from .layers import CodesLayer, problem_of, quantize_input
from .trial import Choice, Chooser

_RESULTS = (torch.float32, torch.float16, torch.bfloat16)
_FP8_SINCE, _INT8_SINCE = (8, 9), (8, 0)


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.LOWERED)
def lower(
    gm: fx.GraphModule,
    *,
    choose: Chooser,
    capability: tuple[int, int],
    refused: Mapping[str, str] | None = None,
) -> Rewrite:
    """The graph with every quantized layer on the kernel that `choose` gives it.

    Linear layers whose input is in floating point, or ranged at every call, run on torchao's
    tensors where it has one.  capability: of the device.  refused: layers whose
    kernels are not to be used, and why.
    Declined: layers that run in floating point, with the reason.
    details: "integer", the layers on kernels; "torchao", those on its tensors; "fused", what was
    fused, by kind; "micros", what was measured, by layer.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        if isinstance(gm.get_submodule(str(node.target)), QuantLayer):
            calls.setdefault(str(node.target), []).append(node)
    declined, on_torchao, lowered = [], [], 0
    micros: dict[str, Any] = {}
    for name, nodes in calls.items():
        layer = gm.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        if (made := _torchao_layer(layer)) is not None:
            gm.set_submodule(name, made)
            on_torchao.append(name)
            continue
        reason = (refused or {}).get(name) or obstacle(layer, "cuda")
        reason = reason or _obstacle(layer, nodes, capability)
        if reason is None:
            dtype = nodes[0].meta["val"].dtype
            sizes = layer_input(nodes[0]).meta["val"].shape
            problem = problem_of(layer, [size_hint(size) for size in sizes])
            choice = choose(problem, dtype)
            micros[name] = choice.micros
            reason = _slower(choice, dtype)
        if reason is not None:
            declined.append(Declined(name, f"runs in floating point: {reason}"))
            gm.set_submodule(name, FloatLayer(layer))
            continue
        on_kernel = CodesLayer(layer, dtype, problem, choice)
        gm.set_submodule(name, on_kernel)
        for node in nodes:
            give_codes(gm, node, name, layer, on_kernel)
        lowered += 1
    details = {
        "integer": lowered,
        "torchao": on_torchao,
        "fused": fuse(gm, choose),
        "micros": {name: times for name, times in micros.items() if times},
    }
    return Rewrite(gm, lowered + len(on_torchao), declined, details)


def alone(
    layer: QuantLayer, node: fx.Node, choose: Chooser, capability: tuple[int, int]
) -> CodesLayer | None:
    """The kernel of this package for a layer that a node calls; None where it runs on another."""
    if _on_torchao(layer) or obstacle(layer, "cuda") or _obstacle(layer, [node], capability):
        return None
    sizes = [size_hint(size) for size in layer_input(node).meta["val"].shape]
    problem, dtype = problem_of(layer, sizes), node.meta["val"].dtype
    choice = choose(problem, dtype)
    return None if choice.engine == "float" else CodesLayer(layer, dtype, problem, choice)


def _torchao_layer(layer: QuantLayer) -> nn.Linear | None:
    """The layer on a torchao tensor, if it is one without a static range that has such a tensor."""
    return to_torchao(layer) if _on_torchao(layer) else None


def _on_torchao(layer: QuantLayer) -> TypeGuard[QuantLinear]:
    if not isinstance(layer, QuantLinear) or not (layer.act_bits is None or layer.dynamic):
        return False
    return torchao_obstacle(layer, layer.codes.device.type) is None


def _obstacle(
    layer: QuantLayer, nodes: Sequence[fx.Node], capability: tuple[int, int]
) -> str | None:
    """Why the kernels cannot run a layer on this device, or None where they can."""
    since = _FP8_SINCE if layer.act_format == "fp8" else _INT8_SINCE
    if capability < since:
        need, have = (f"{major}.{minor}" for major, minor in (since, capability))
        kind = "fp8" if layer.act_format == "fp8" else "int8"
        return f"{kind} kernels need compute capability {need}, this device has {have}"
    dtypes = {node.meta["val"].dtype for node in nodes}
    if len(dtypes) > 1 or not dtypes <= set(_RESULTS):
        return f"its results have dtypes {', '.join(sorted(map(str, dtypes)))}"
    return None


def _slower(choice: Choice, dtype: torch.dtype) -> str | None:
    """Why a kernel is not used although there is one: the float layer was measured faster."""
    if choice.engine != "float":
        return None
    ours = min((t for name, t in choice.micros.items() if name != "float"), default=float("inf"))
    float_name = str(dtype).removeprefix("torch.")
    return f"{float_name} took {choice.micros['float']:.1f} us, the kernels {ours:.1f} us"


def give_codes(
    gm: fx.GraphModule, node: fx.Node, name: str, layer: QuantLayer, made: CodesLayer
) -> None:
    """Pass the codes of its input and their scale to the call of a layer."""
    x = layer_input(node)
    if isinstance(layer, QuantConv) and layer.padding_mode != "zeros":
        padded, mode = f"{node.name}_padded", layer.padding_mode
        x = call_before(node, F.pad, x, layer.pad_widths, mode=mode, name=padded)
    if layer.dynamic:
        assert layer.act_bits is not None
        steps = symmetric_steps(layer.act_bits, layer.act_format)
        measured = (dynamic_scale, x, layer.ranged_dims, steps)
        scale = call_before(node, *measured, name=f"{node.name}_scale")
    elif layer.per_timestep:
        given = node.args[1] if len(node.args) > 1 else node.kwargs["scale"]
        assert isinstance(given, fx.Node)
        scale = given
    else:
        scale = buffer_before(gm, node, f"{name}.act_scale")
    settings = (made.zero_point, made.levels, made.codes_dtype, made.pads)
    codes = call_before(node, quantize_input, x, scale, *settings, name=f"{node.name}_codes")
    node.args, node.kwargs = (codes, scale), {}
