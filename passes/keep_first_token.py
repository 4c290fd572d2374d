"""Keep the exact output of a first token that is always the same.

y = linear(x)
    ->    known = all(x[:, :1] == token);  y = linear(x with 0 for its first token where known)
          y = cat([where(known, row, y[:, :1]), y[:, 1:]], 1),  with row = linear(token)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from tfmq_fx.dataflow import Binding, BindingTimes, binding_times
from tfmq_fx.dialect import Stage
from tfmq_fx.graph import Declined, Rewrite, graph_pass, set_buffer
from tfmq_fx.layers import (
    buffer_before,
    call_before,
    layer_before,
    layer_input,
    readers,
    replace_call,
    sites_named,
)
from tfmq_fx.ops import is_view, writers
from tfmq_fx.regions import extract
from tfmq_fx.sites import Site

TOKEN, OUTPUT = "first_token", "first_output"  # ends of the buffers' names
_FIRST, _REST = (slice(None), slice(None, 1)), (slice(None), slice(1, None))


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def keep_first_token(
    gm: fx.GraphModule, *, chunks: Iterable[Sequence[Tensor]], only: Collection[str]
) -> Rewrite:
    """The graph in which layers do not see the first token of a text, as in MixDQ; outputs are
    equal up to float rounding.

    Text encoders give their first token the same value in every prompt, an outlier that stretches
    the range of what reads it.  only: the sites that will be quantized.  Rewritten: linear layers
    of (B, T, D) that read a condition of the request, or an input through views and casts, whose
    first token is the same, bit for bit, in all samples of `chunks` (placeholder values of one
    batch each, in order).  At each call a first token that is another one is computed with the
    rest, so that another text encoder gets no wrong row.  Layers that read the same value share
    what is done to it.  Buffers: `<site>_first_token` (1, 1, D) and `<site>_first_output`
    (1, 1, out), dots of the site as underscores.
    details["peaks"]: the largest magnitude in the token and in the others, by site.
    Raises ConfigError for names that are no layers.
    """
    sites, declined = sites_named(gm, only)
    times = binding_times(gm, gm.meta.get("conditions", ()))
    fitting = []
    for site in sites:
        if reason := _reason(site, times, {s.name for s in sites}):
            declined.append(Declined(site.name, reason))
        else:
            fitting.append(site)
    seen = _first_tokens(gm, fitting, chunks)
    chosen = []
    for site in fitting:
        if reason := seen[site.name].reason():
            declined.append(Declined(site.name, reason))
        else:
            chosen.append(site)
    rows: dict[str, str] = {}
    for site in chosen:
        rows[site.name] = set_buffer(gm, _buffer(site, OUTPUT), site.layer(seen[site.name].token))
    for x, calls in readers(gm, chosen):
        first, call = calls[0]
        token = seen[first.name].token
        assert token is not None  # two samples were seen
        known, rest = _without_token(gm, x, call, set_buffer(gm, _buffer(first, TOKEN), token))
        for site, node in calls:
            _keep(gm, site, node, known, rest, rows[site.name])
    peaks = {site.name: [seen[site.name].peak, seen[site.name].rest_peak] for site in chosen}
    return Rewrite(gm, len(chosen), declined, {"peaks": peaks})


def _without_token(
    gm: fx.GraphModule, x: fx.Node, node: fx.Node, buffer: str
) -> tuple[fx.Node, fx.Node]:
    """Whether the first token of x is the known one, (B, 1, 1), and x with 0 in its place where it
    is; as early as x is there, or in front of `node` where x is written in place."""
    behind = x.next
    while behind.op == "placeholder":
        behind = behind.next
    token = buffer_before(gm, node, buffer)
    first = call_before(node, operator.getitem, x, _FIRST, name=f"{x.name}_first")
    same = call_before(node, torch.eq, first, token, name=f"{x.name}_same")
    known = call_before(node, torch.all, same, dim=-1, keepdim=True, name=f"{x.name}_known")
    masked = call_before(node, torch.masked_fill, first, known, 0.0, name=f"{x.name}_masked")
    others = call_before(node, operator.getitem, x, _REST, name=f"{x.name}_others")
    rest = call_before(node, torch.cat, [masked, others], 1, name=f"{x.name}_rest")
    written = any(x in bases for _, bases in writers(gm))
    for made in (token, first, same, known, masked, others, rest):
        made.meta["nn_module_stack"] = {"": ("", type(gm))}  # several modules read them
        if not written:  # a block's inputs are to be there before its first layer runs
            behind.prepend(made)
    return known, rest


def _keep(
    gm: fx.GraphModule, site: Site, node: fx.Node, known: fx.Node, rest: fx.Node, buffer: str
) -> None:
    """Replace the call of a layer by one on `rest`, and its first row where that is known."""
    name = node.name
    row = buffer_before(gm, node, buffer)
    y = layer_before(node, site.name, site.layer, rest, f"{name}_rest")
    first = call_before(node, operator.getitem, y, _FIRST, name=f"{name}_first")
    kept = call_before(node, torch.where, known, row, first, name=f"{name}_kept")
    others = call_before(node, operator.getitem, y, _REST, name=f"{name}_others")
    replace_call(node, call_before(node, torch.cat, [kept, others], 1, name=f"{name}_cat"))


def _buffer(site: Site, end: str) -> str:
    return f"{site.name.replace('.', '_')}_{end}"


# ---------------------------------------------------------------------------- which layers


def _reason(site: Site, times: BindingTimes, quantized: Collection[str]) -> str:
    """Why the first token of what a site reads is not looked at; "" where it is."""
    if not isinstance(site.layer, nn.Linear):
        return "no linear layer"
    for x in map(layer_input, site.nodes):
        shape = tuple(x.meta["val"].shape)
        if len(shape) != 3:
            return f"its input {shape} is not (batch, tokens, channels)"
        if times[x] is not Binding.C and not _is_input(x):
            return "its input is no condition of the request"
        if inside := _layers_before(x) & set(quantized):
            return f"its input comes through {min(inside)}, which is quantized too"
    return ""


def _is_input(node: fx.Node) -> bool:
    """Whether a value is an input of the graph, but for views and casts."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _layers_before(node: fx.Node) -> set[str]:
    """Paths of the modules that a value comes through."""
    found, seen, todo = set[str](), set[fx.Node](), [node]
    while todo:
        used = todo.pop()
        if used in seen:
            continue
        seen.add(used)
        todo += used.all_input_nodes
        if used.op == "call_module":
            found.add(str(used.target))
    return found


@dataclass(slots=True)
class _Seen:
    """The first tokens of one value or several.

    token: one of them, (1, 1, D).  different: the bytes of all that differ.  peak, rest_peak: the
    largest magnitudes in them and in the other tokens.
    """

    token: Tensor | None = None
    samples: int = 0
    different: set[bytes] = field(default_factory=set)
    peak: float = 0.0
    rest_peak: float = 0.0

    def add(self, x: Tensor) -> None:
        """Look at x (B, T, D)."""
        first, rest = x[:, :1], x[:, 1:]
        self.token = first[:1].clone() if self.token is None else self.token
        rows = first.contiguous().view(torch.uint8).flatten(1).cpu().numpy()
        self.samples += len(rows)
        self.different.update(row.tobytes() for row in rows)
        self.peak = max(self.peak, float(first.abs().max()))
        if rest.numel():
            self.rest_peak = max(self.rest_peak, float(rest.abs().max()))

    def joined(self, other: _Seen) -> _Seen:
        """The first tokens of both."""
        return _Seen(
            other.token if self.token is None else self.token,
            self.samples + other.samples,
            self.different | other.different,
            max(self.peak, other.peak),
            max(self.rest_peak, other.rest_peak),
        )

    def reason(self) -> str:
        """Why the token cannot be kept; "" where it can."""
        if len(self.different) > 1:
            return f"its first token has {len(self.different)} values in {self.samples} samples"
        if self.samples < 2:
            return "it takes two samples to tell whether its first token varies"
        if self.peak == 0:
            return "its first token is 0, which is exact when quantized"
        return ""


def _first_tokens(
    gm: fx.GraphModule, sites: Sequence[Site], chunks: Iterable[Sequence[Tensor]]
) -> dict[str, _Seen]:
    """What the first token of the input of each site is, over all of `chunks`."""
    seen = {layer_input(node): _Seen() for site in sites for node in site.nodes}
    part = extract(gm, list(seen), list(gm.graph.find_nodes(op="placeholder")))
    for chunk in chunks:
        for each, value in zip(seen.values(), part(*chunk), strict=True):
            each.add(value)
    return {
        site.name: functools.reduce(_Seen.joined, (seen[layer_input(n)] for n in site.nodes))
        for site in sites
    }
