"""Fit a converted graph to a call for which the model's code computes other constants.

The model is captured for the new call. Where that graph and the one that the converted graph was
made from do the same with inputs, and differ only in what they compute from sizes and constants (a
number of tokens, an embedding of positions), that is put into the converted graph. Layers, tables
and quantization parameters are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from tfmq_fx.core.errors import InputError
from tfmq_fx.ir.binding_times import binding_times
from tfmq_fx.ir.graph import KEYS, fork, named_tensors, set_buffer, timestep_node
from tfmq_fx.ir.graph_pass import prune
from tfmq_fx.ir.held_values import EXAMPLES
from tfmq_fx.ir.verifier import check
from tfmq_fx.quant.timestep_table import QuantTimestepTable
from tfmq_fx.serialization.provenance import describe
from tfmq_fx.serialization.saved_names import is_own

from .models import Converted, Prepared


def with_other_sizes(model: Converted, before: fx.GraphModule, prepared: Prepared) -> Converted:
    """Return `model` for the call that `prepared` was captured for.

    before: the graph that `model` was converted from.  Raises InputError where the two captured
    graphs differ in more than constants, or a pass of the conversion replaced what differs.
    """
    gm = fork(model.gm)
    fitting = _Fitting(before, prepared.gm, gm)
    fitting.pair()
    fitting.fit()
    prune(gm.graph)
    gm.delete_all_unused_submodules()
    _retype_keys(gm, model.gm, prepared)
    _compute_values(gm, fitting.values(), timestep_node(prepared.gm).meta["val"])
    gm.meta[EXAMPLES] = prepared.gm.meta.get(EXAMPLES, {})
    gm.recompile()
    check(gm, gm.meta["stage"])
    record = copy.deepcopy(model.record) | {"capture": dict(prepared.gm.meta["capture"])}
    origin = None
    if model.origin is not None:  # what a call adds is computed as this form computes it
        described = describe(prepared.unmerged, prepared.source)
        origin = replace(model.origin, call=prepared.call, **described)
    settings = model.settings() | {"record": record, "origin": origin}
    return Converted(gm, prepared.call, **settings)


def _retype_keys(gm: fx.GraphModule, old: fx.GraphModule, prepared: Prepared) -> None:
    """Give look-ups the keys of a call whose timesteps are floats where there were integers."""
    timesteps = prepared.timesteps
    before, after = (timestep_node(each).meta["val"].dtype for each in (old, prepared.gm))
    if timesteps is None or before.is_floating_point == after.is_floating_point:
        return
    if any(isinstance(module, QuantTimestepTable) for module in gm.modules()):
        raise InputError(
            f"the call has timesteps in {after}, and the integer tables have {before}. Prepare, "
            "calibrate and convert the model with such timesteps"
        )
    for name, keys in list(gm.named_buffers(recurse=False)):
        if name.startswith(KEYS):
            setattr(gm, name, keys.to(timesteps.dtype))
    gm.meta["timesteps"] = timesteps.to(gm.meta["timesteps"].device)


class _Fitting:
    """Fits `own`, converted from `before`, to the constants of `after`."""

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule, own: fx.GraphModule) -> None:
        self.before, self.after, self.own = before, after, own
        self._nodes = {node.name: node for node in own.graph.nodes}
        self._constant = {
            node for gm in (before, after) for node, deps in binding_times(gm).deps.items()
            if not deps and node.op not in ("placeholder", "output")
        }  # fmt: skip
        self.pairs: dict[fx.Node, fx.Node] = {}  # of `before` -> of `after`
        self._back: dict[fx.Node, fx.Node] = {}  # the other way round
        self._same: dict[tuple[fx.Node, fx.Node], bool] = {}
        self._copies: dict[fx.Node, fx.Node] = {}  # constants of `after` -> of `own`

    def pair(self) -> None:
        """Pair the nodes that read inputs, in order; raises InputError where they do not match."""
        olds, news = (
            [node for node in gm.graph.nodes if node not in self._constant]
            for gm in (self.before, self.after)
        )
        for old, new in zip(olds, news, strict=False):
            self.pairs[old], self._back[new] = new, old
            same = old.op == new.op and (old.op == "output" or str(old.target) == str(new.target))
            parts = ((old.args, new.args), (old.kwargs, new.kwargs))
            if not same or not all(self._alike(a, b) for a, b in parts):
                raise InputError(
                    f"the model computes otherwise for this call: {new.name} where there was "
                    f"{old.name}. Prepare, calibrate and convert it with such inputs"
                )
            if old.op == "call_module" and not self._same_layer(str(old.target)):
                raise InputError(
                    f"{old.target} has other weights for this call, computed from its sizes. "
                    "Prepare, calibrate and convert the model with such inputs"
                )
        if len(olds) != len(news):
            raise InputError(
                f"the model computes otherwise for this call ({len(news)} operations where there "
                f"were {len(olds)}). Prepare, calibrate and convert it with such inputs"
            )

    def _same_layer(self, path: str) -> bool:
        """Whether a layer has the same tensors in both graphs; most are the source's own."""
        a, b = (dict(named_tensors(gm.get_submodule(path))) for gm in (self.before, self.after))
        return a.keys() == b.keys() and all(
            a[name].data_ptr() == b[name].data_ptr() or torch.equal(a[name], b[name]) for name in a
        )

    def fit(self) -> None:
        """Put the constants of `after` where those of `before` stood in `own`."""
        for old, new in self.pairs.items():
            parts = ((old.args, new.args), (old.kwargs, new.kwargs))
            if all(self._equal(a, b) for a, b in parts):
                continue
            own = self._nodes.get(old.name)
            if own is None or own.op != old.op or str(own.target) != str(old.target):
                raise InputError(
                    f"{old.name} is another for this call, and the conversion has replaced it. "
                    "Prepare, calibrate and convert the model with such inputs"
                )
            own.args = self._fitted(old.args, new.args, own.args, own)
            own.kwargs = self._fitted(old.kwargs, new.kwargs, own.kwargs, own)

    def values(self) -> dict[fx.Node, Any]:
        """The value of each node of `own` that stands for one of `after`."""
        found = {copied: new.meta["val"] for new, copied in self._copies.items()}
        for old, new in self.pairs.items():
            own = self._nodes.get(old.name)
            if own is not None and own.op == old.op and own.op != "output":
                found[own] = new.meta.get("val")
        return found

    def _alike(self, old: Any, new: Any) -> bool:
        """Whether arguments have the same structure and read the same values; constants may
        differ."""
        if self._is_constant(old) and self._is_constant(new):
            return True
        if isinstance(old, fx.Node) or isinstance(new, fx.Node):
            return isinstance(old, fx.Node) and self.pairs.get(old) is new
        pairs = list(_parts(old, new))
        return bool(pairs) and all(self._alike(a, b) for a, b in pairs)

    def _is_constant(self, value: Any) -> bool:
        """Whether a constant or the size of something, which may be given by another."""
        if isinstance(value, fx.Node):
            return value in self._constant
        return not isinstance(value, (tuple, list, Mapping, slice)) or not _holds_node(value)

    def _equal(self, old: Any, new: Any) -> bool:
        """Whether constants are equal, or computed alike from equal ones."""
        if isinstance(old, fx.Node) and isinstance(new, fx.Node):
            if old not in self._constant:
                return self.pairs.get(old) is new
            if (old, new) not in self._same:
                self._same[old, new] = self._computed_alike(old, new)
            return self._same[old, new]
        if isinstance(old, fx.Node) or isinstance(new, fx.Node):
            return False
        if type(old) is not type(new):
            return False
        if isinstance(old, (tuple, list, Mapping)) and len(old) != len(new):
            return False
        if isinstance(old, (tuple, list, Mapping, slice)) and _holds_node((old, new)):
            pairs = list(_parts(old, new))
            return bool(pairs) and all(self._equal(a, b) for a, b in pairs)
        return bool(old == new)

    def _computed_alike(self, old: fx.Node, new: fx.Node) -> bool:
        if old.op != new.op:
            return False
        if old.op == "get_attr":
            a: Tensor = attrgetter(str(old.target))(self.before)
            b: Tensor = attrgetter(str(new.target))(self.after)
            return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        same = str(old.target) == str(new.target)
        return same and self._equal(old.args, new.args) and self._equal(old.kwargs, new.kwargs)

    def _fitted(self, old: Any, new: Any, own: Any, where: fx.Node) -> Any:
        """The arguments `own` with the constants of `new` where those of `old` stood."""
        if self._equal(old, new) or (isinstance(old, fx.Node) and old not in self._constant):
            return own
        if self._is_constant(old) and self._is_constant(new):
            if not _stands_for(own, old):
                raise InputError(
                    f"{where.name}: the conversion replaced {old!r}, which is another for this "
                    "call. Prepare, calibrate and convert the model with such inputs"
                )
            return fx.node.map_arg(new, lambda node: self._copy(node, where))
        if isinstance(old, slice):
            return slice(*(self._fitted(a, b, c, where) for a, b, c in _parts(old, new, own)))
        if isinstance(old, Mapping):
            return {key: self._fitted(old[key], new[key], own[key], where) for key in old}
        return type(own)(self._fitted(a, b, c, where) for a, b, c in _parts(old, new, own))

    def _copy(self, new: fx.Node, where: fx.Node) -> fx.Node:
        """A node of `own` with the value of a node of `after`, in front of `where`."""
        if new not in self._constant:
            old = self._back[new]
            if old.name not in self._nodes:
                raise InputError(f"{where.name}: needs {old.name}, which the conversion replaced")
            known: fx.Node = self._nodes[old.name]
            return known
        if new in self._copies:
            return self._copies[new]
        if new.op == "get_attr":
            tensor = attrgetter(str(new.target))(self.after)
            name = set_buffer(self.own, f"{str(new.target).replace('.', '_')}_other", tensor)
            with self.own.graph.inserting_before(where):
                copied = self.own.graph.get_attr(name)
        else:
            if new.op == "call_module":
                layer = dict(self.own.named_modules()).get(str(new.target))
                if layer is None or is_own(type(layer)):
                    raise InputError(f"{where.name}: needs the layer {new.target} as it was")
            with self.own.graph.inserting_before(where):
                copied = self.own.graph.node_copy(new, lambda node: self._copy(node, where))
        copied.meta = dict(new.meta)
        self._copies[new] = copied
        return copied


def _stands_for(own: Any, old: Any) -> bool:
    """Whether an argument of the converted graph is still that of the captured one."""
    if isinstance(own, fx.Node) or isinstance(old, fx.Node):
        return isinstance(own, fx.Node) and isinstance(old, fx.Node) and own.name == old.name
    return bool(own == old)


def _parts(*values: Any) -> Iterator[tuple[Any, ...]]:
    """The parts of containers of one structure, side by side; none where they differ."""
    first = values[0]
    if isinstance(first, slice):
        if all(isinstance(value, slice) for value in values):
            for name in ("start", "stop", "step"):
                yield tuple(getattr(value, name) for value in values)
    elif isinstance(first, Mapping):
        if all(isinstance(v, Mapping) and v.keys() == first.keys() for v in values):
            yield from (tuple(value[key] for value in values) for key in first)
    elif isinstance(first, (tuple, list)) and all(
        isinstance(v, (tuple, list)) and len(v) == len(first) for v in values
    ):
        yield from zip(*values, strict=True)


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def _compute_values(gm: fx.GraphModule, values: Mapping[fx.Node, Any], t: Tensor) -> None:
    """Set each node's value for the new call: that of the node it stands for, or computed."""
    mode: Any = t.fake_mode  # type: ignore[attr-defined]
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if values.get(node) is not None:
            node.meta["val"] = values[node]
            continue
        if node.op == "get_attr":
            tensor: Tensor = attrgetter(str(node.target))(gm)
            node.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        with mode, enable_python_dispatcher(), torch.no_grad():
            if node.op == "call_module":
                node.meta["val"] = gm.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                node.meta["val"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["val"] = node.target(*args, **kwargs)
