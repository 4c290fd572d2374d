"""Correct the output of a graph by the error that calibration measured at each timestep.

return ehat    ->    row = timestep_row(output_correction, keys, t);  return (ehat - D) / (1 + k)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from tfmq_fx.calibration.output_errors import (
    OutputErrors,
    channel_count,
    channel_dim,
    first_output,
    obstacle,
)
from tfmq_fx.core.config import Correction
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import insert_timestep_row
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass

CORRECTION = "output_correction"  # buffer: D of each channel and, with "noise", 1 / (1 + k)


@graph_pass(takes=(Stage.FOLDED, Stage.QUANTIZED), gives=Stage.QUANTIZED)
def correct_outputs(
    gm: fx.GraphModule, *, errors: OutputErrors, kind: Correction, timesteps: Tensor
) -> Rewrite:
    """The graph whose first output is corrected at each of `timesteps` (K,).

    errors: of this graph, over the same timesteps.  kind: "bias" takes out the mean error of each
    channel, in closed form as TAC does; "noise" is PTQD's (ehat - D) / (1 + k), with k = 0 at
    timesteps where that is better.  Timesteps where neither helps samples that it was not fitted
    on keep their output bit for bit.
    details: how many timesteps were corrected and interpolated; error_before and error_after, mean
    relative squared errors of such samples (the choice was made on them too, so that after is a
    little too good).
    """
    if errors.timesteps.tolist() != timesteps.tolist():
        raise ConfigError(
            f"the errors are of {len(errors.timesteps)} timesteps other than the {len(timesteps)} "
            "to correct"
        )
    if kind not in ("bias", "noise"):
        raise ConfigError(f"a correction is 'bias' or 'noise', got {kind!r}")
    node = first_output(gm)
    reason = obstacle(gm)
    if hasattr(gm, CORRECTION):
        reason = "it is corrected already"
    elif not reason and not bool(errors.measured.any()):
        reason = "no timestep was seen in two calibration samples or more"
    details: dict[str, Any] = {"kind": kind, "timesteps": len(timesteps)}
    if reason:
        return Rewrite(gm, 0, [Declined(getattr(node, "name", "output"), reason)], details)
    correction = errors.correction(kind)
    corrected = int(correction.corrected.sum())
    details |= {
        "corrected": corrected,
        "interpolated": correction.interpolated,
        "error_before": correction.before,
        "error_after": correction.after,
    }
    if not corrected:
        reason = "no correction helps samples that it was not fitted on"
        return Rewrite(gm, 0, [Declined(node.name, reason)], details)
    columns = [correction.shift]
    if kind == "noise":
        columns.append(1 / (1 + correction.k)[:, None])
    table = torch.cat(columns, 1).float().to(timesteps.device)
    row = insert_timestep_row(gm, CORRECTION, table, timesteps)
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        new = _corrected(gm, node, row)
    value = output.args[0]
    many = isinstance(value, (tuple, list))
    output.args = (type(value)([new, *value[1:]]) if many else new,)
    return Rewrite(gm, 1, [], details)


def _corrected(gm: fx.GraphModule, node: fx.Node, row: fx.Node) -> fx.Node:
    """Insert (node - shift) * factor, in the dtype of `node`; rows without a factor only shift."""
    value, channels = node.meta["val"], int(channel_count(node))
    shape = [-1, *[1] * (value.dim() - 1)]
    shape[channel_dim(value.shape)] = channels
    new = _call(gm, operator.sub, node, _columns(gm, row, slice(0, channels), shape, node))
    if row.meta["val"].shape[1] > channels:
        shape = [-1, *[1] * (value.dim() - 1)]
        factor = _columns(gm, row, slice(channels, channels + 1), shape, node)
        new = _call(gm, operator.mul, new, factor)
    return new


def _columns(
    gm: fx.GraphModule, row: fx.Node, columns: slice, shape: list[int], like: fx.Node
) -> fx.Node:
    """Insert a read of columns of a row, in `shape` and the dtype of `like` (which `.half()` may
    change)."""
    part = _call(gm, operator.getitem, row, (slice(None), columns))
    return _call(gm, "type_as", _call(gm, "reshape", part, shape), like)


def _call(gm: fx.GraphModule, target: Any, *args: Any) -> fx.Node:
    """Insert a call at the insertion point of the graph, with its fake value."""
    method = isinstance(target, str)
    node = gm.graph.create_node("call_method" if method else "call_function", target, args)
    values = fx.map_arg(args, lambda used: used.meta["val"])
    function = getattr(Tensor, target) if method else target
    with args[0].meta["val"].fake_mode, enable_python_dispatcher():
        value = function(*values)
    node.meta = {"val": value, "nn_module_stack": {"": ("", type(gm))}}
    return node
