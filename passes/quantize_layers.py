"""Replace convolution and linear layers by quantized ones, weights rounded to nearest.

y = conv(x)    ->    scales = timestep_row(activation_scales, keys, t);  y = conv_q(x, scales[:, i])
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import insert_timestep_row, opaque_modules, timestep_node
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.layer_edits import call_before, layer_input
from tfmq_fx.ir.opaque_layers import example_arguments, inner_sites
from tfmq_fx.ir.sites import Site, find_sites
from tfmq_fx.quant.affine import activation_scales, weight_groups, weight_qparams
from tfmq_fx.quant.gptq import round_nearest
from tfmq_fx.quant.modules import kind_of, weight_rows
from tfmq_fx.quant.quant_layer import QuantLayer

SCALES = "activation_scales"  # buffer: one row of input scales for each timestep


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED), gives=Stage.QUANTIZED)
def quantize_layers(
    gm: fx.GraphModule,
    *,
    plan: Mapping[str, LayerConfig],
    ranges: Mapping[str, Ranges],
    timesteps: Tensor,
    ready: Mapping[str, QuantLayer] | None = None,
) -> Rewrite:
    """The graph with every planned site quantized.

    plan: what each site becomes; sites it leaves in floating point are declined with that reason.
    ranges: the input range of each site that calibration ranges, over `timesteps` (K,).
    ready: layers quantized elsewhere (the temporal block), put in place as they are.
    A site whose input does not carry the batch in dim 0 gets one static range.  Layers inside
    opaque modules are planned by name like sites, without calibrated ranges.
    """
    sites, declined = find_sites(gm)
    scales: dict[str, Tensor] = {}  # of sites with a scale for each timestep, (K,)
    changed = 0
    for site in sites:
        layer_plan = plan[site.name]
        if layer_plan.weights is None:
            declined.append(Declined(site.name, "its configuration keeps it in floating point"))
            continue
        layer = (ready or {}).get(site.name)
        per_timestep, reason = _per_timestep(gm, site, layer_plan.activations)
        if reason:
            declined.append(Declined(site.name, reason))
        if layer is None:
            layer = _quantized(site, layer_plan, per_timestep)
        size = layer_plan.weights.group_size
        if size and layer.weight_shape[1] % size:
            reason = f"one scale a channel: {size} does not divide {layer.weight_shape[1]} inputs"
            declined.append(Declined(site.name, reason))
        if (acts := layer_plan.calibrated) is not None:
            seen = ranges[site.name]
            low, high = seen.low, seen.high
            if not per_timestep:
                low, high = low.min()[None], high.max()[None]
            scale, zero = activation_scales(low, high, bits=acts.bits, format=acts.format)
            layer.set_static_range(float(scale.max()), zero)
            if per_timestep:
                scales[site.name] = scale
        gm.set_submodule(site.name, layer)
        changed += 1
    if scales:
        table = torch.stack(list(scales.values()), 1).to(timesteps.device)
        row = insert_timestep_row(gm, SCALES, table, timesteps)
    changed += _quantize_inner(gm, plan, declined)
    calls = {site.name: site.nodes for site in sites}
    for column, name in enumerate(scales):
        for node in calls[name]:
            place = (slice(None), column)
            read = call_before(node, operator.getitem, row, place, name=f"scale_{node.name}")
            node.args, node.kwargs = (layer_input(node), read), {}
    return Rewrite(gm, changed, declined)


def _quantize_inner(
    gm: fx.GraphModule, plan: Mapping[str, LayerConfig], declined: list[Declined]
) -> int:
    """Quantize the planned layers inside opaque modules; returns how many.

    A module whose code does not take quantized layers stays in floating point.
    """
    sites, left = inner_sites(gm)
    declined += left
    changed = 0
    for path, module in opaque_modules(gm).items():
        inner = [site for site in sites if site.name.startswith(f"{path}.")]
        planned = [site for site in inner if plan[site.name].weights is not None]
        kept = "its configuration keeps it in floating point"
        declined += [Declined(site.name, kept) for site in inner if site not in planned]
        if not planned:
            continue
        for site in planned:
            gm.set_submodule(site.name, _quantized(site, plan[site.name], per_timestep=False))
        args, kwargs = example_arguments(gm.graph.find_nodes(op="call_module", target=path)[0])
        try:
            module(*args, **kwargs)
        except Exception as error:  # whatever the model's code raises
            reason = f"the code of {path} does not take quantized layers: {error}"
            for site in planned:
                gm.set_submodule(site.name, site.layer)
                declined.append(Declined(site.name, reason))
            continue
        changed += len(planned)
    return changed


def _per_timestep(
    gm: fx.GraphModule, site: Site, spec: ActivationSpec | None
) -> tuple[bool, str | None]:
    """Whether the input of a site gets a scale per timestep; why not, where the spec wants one."""
    if spec is None or not spec.per_timestep:
        return False, None
    batch = timestep_node(gm).meta["val"].shape[0]
    for node in site.nodes:
        shape = node.all_input_nodes[0].meta["val"].shape
        if len(shape) < 2 or str(shape[0]) != str(batch):
            return False, f"static range: dim 0 of its input {tuple(shape)} is not the batch"
    return True, None


def _quantized(site: Site, plan: LayerConfig, per_timestep: bool) -> QuantLayer:
    kind = kind_of(site.layer)
    assert kind is not None and plan.weights is not None
    weight = weight_rows(site.layer)
    acts = plan.activations
    layer = kind.from_float(
        site.layer,  # type: ignore[arg-type]  # the class was chosen by the layer's own
        weight_bits=plan.weights.bits,
        weight_format=plan.weights.format,
        weight_groups=weight_groups(weight.shape, plan.weights),
        act_bits=acts.bits if acts else None,
        act_format=acts.format if acts else "int",
        dynamic=acts is not None and acts.dynamic,
        per_timestep=per_timestep,
    )
    grid = weight_qparams(weight, plan.weights)
    codes = round_nearest(weight.detach().float().flatten(1), grid)
    layer.set_weight(codes.view(weight.shape), grid)
    return layer
