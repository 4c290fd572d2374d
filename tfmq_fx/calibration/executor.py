"""Run a graph node by node over many samples, stopping where a pass reads or replaces something.

Only live values are kept: the graph's widest cut times the samples, not the sum of all
activations. From stop to stop one chunk of samples runs after another, so that only the values of
one chunk need be in memory; the others may wait in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.ir.node_info import writes_to_values

from .activation_store import ActivationStore


class ChunkValues(Sequence[Any]):
    """The value of one node for each chunk."""

    def __init__(self, spill: ActivationStore) -> None:
        self._spill = spill
        self.packed: list[Any] = []

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, chunk: Any) -> Any:
        return self._spill.unpack(self.packed[chunk])


class LayerwiseExecutor:
    """Runs `gm` over chunks of inputs, as far as its values are needed.

    chunks: for each chunk the placeholder values in order.  spill: where values wait; in memory by
    default, and always in memory where the graph writes to its values in place, as they may share
    it.  Modules are looked up when their node runs, so a layer may be replaced until then.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        chunks: Sequence[Sequence[Tensor]],
        *,
        spill: ActivationStore | None = None,
    ) -> None:
        self.gm, self.chunks = gm, chunks
        self.values: dict[fx.Node, ChunkValues] = {}
        self._spill = ActivationStore() if spill is None or writes_to_values(gm) else spill
        tensors = [x for chunk in chunks for x in chunk if isinstance(x, Tensor)]
        self._pinned = {x.untyped_storage().data_ptr() for x in tensors}
        self._nodes: list[fx.Node] = list(gm.graph.nodes)
        self._by_name = {node.name: node for node in self._nodes}
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._position = 0
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._last_use = dict(self._order)
        for i, node in enumerate(self._nodes):
            self._last_use |= dict.fromkeys(node.all_input_nodes, i)
        self._held: set[fx.Node] = set()

    def node(self, name: str) -> fx.Node:
        """The graph's node called `name`."""
        return self._by_name[name]

    def has(self, name: str) -> bool:
        """Whether the graph has a node called `name`."""
        return name in self._by_name

    def stop_before(self, node: fx.Node) -> None:
        """Run every node in front of `node`; its inputs are then in `values`."""
        if self._position > self._order[node]:
            raise ValueError(f"{node.name} has run already")
        self._advance(self._order[node])

    def run_past(self, nodes: Iterable[fx.Node]) -> None:
        """Run until every one of `nodes` has run."""
        self._advance(max(self._order[node] for node in nodes) + 1)

    def keep(self, nodes: Iterable[fx.Node]) -> None:
        """Keep the values of `nodes` past their last use, until `release`."""
        self._held.update(nodes)

    def release(self, nodes: Iterable[fx.Node] | None = None) -> None:
        """Drop the values of `nodes` (default: all) that only `keep` held in memory."""
        for node in self._held.intersection(self._held if nodes is None else nodes):
            self._held.discard(node)
            if self._last_use.get(node, -1) < self._position:
                self._drop(node)

    def arguments(self, node: fx.Node, chunk: int) -> tuple[Any, dict[str, Any]]:
        """The call arguments of `node` for one chunk."""
        used = {argument: self.values[argument][chunk] for argument in node.all_input_nodes}
        return fx.map_arg(node.args, used.__getitem__), fx.map_arg(node.kwargs, used.__getitem__)

    @torch.no_grad()
    def run_to_end(self, chunk: int) -> Any:
        """The graph's output for one chunk, run on from here without moving the position.

        Not for graphs that write in place: they would write to the values held here.
        """
        output = ChunkValues(self._spill)
        self._run_chunk(self._nodes[self._position :], chunk, {self._nodes[-1]: output})
        return output[0]

    @torch.no_grad()
    def _advance(self, stop: int) -> None:
        """Run the nodes in front of position `stop`, chunk by chunk."""
        if stop <= self._position:
            return
        nodes = self._nodes[self._position : stop]
        needed = [n for n in nodes if n in self._held or self._last_use[n] >= stop]
        results = {node: ChunkValues(self._spill) for node in needed}
        for chunk in range(len(self.chunks)):
            self._run_chunk(nodes, chunk, results)
        self._position = stop
        self.values |= results
        for node in list(self.values):
            if self._last_use[node] < stop and node not in self._held:
                self._drop(node)

    def _run_chunk(
        self, nodes: Sequence[fx.Node], chunk: int, results: Mapping[fx.Node, ChunkValues]
    ) -> None:
        """Run `nodes` on one chunk and append the values of those in `results` there."""
        values = dict[fx.Node, Any]()

        def value(used: fx.Node) -> Any:
            if used not in values:
                values[used] = self.values[used][chunk]
            return values[used]

        for position, node in enumerate(nodes, self._position):
            values[node] = self._run(node, chunk, value)
            for used in {*node.all_input_nodes, node}:
                if self._last_use[used] <= position and used not in results:
                    values.pop(used, None)
        for node, column in results.items():
            column.packed.append(self._spill.pack(values[node], self._pinned))

    def _drop(self, node: fx.Node) -> None:
        if column := self.values.pop(node, None):
            for packed in column.packed:
                self._spill.drop(packed)

    def _run(self, node: fx.Node, chunk: int, value: Callable[[fx.Node], Any]) -> Any:
        if node.op == "placeholder":
            return self.chunks[chunk][self._inputs.index(node)]
        if node.op == "get_attr":
            attribute = attrgetter(str(node.target))(self.gm)
            if isinstance(attribute, Tensor):
                self._pinned.add(attribute.untyped_storage().data_ptr())
            return attribute
        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        return args[0]  # output
