"""Run a graph node by node over many samples, stopping where a pass wants to look or change.

A walk keeps only live values, so that its memory is the graph's widest cut times the samples, not
the sum of all activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Chunks = list[Any]  # one value per chunk of samples


class Walk:
    """Lazy execution of `gm` over chunks of inputs.

    chunks: for each chunk the placeholder values in order.  Modules are looked up when their node
    runs, so a layer replaced before the walk reaches it is the one that runs.
    """

    def __init__(self, gm: fx.GraphModule, chunks: Sequence[Sequence[Tensor]]) -> None:
        self.gm, self.chunks = gm, chunks
        self.values: dict[fx.Node, Chunks] = {}
        self._nodes: list[fx.Node] = list(gm.graph.nodes)
        self._by_name = {node.name: node for node in self._nodes}
        self._position = 0
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._last_use = _last_uses(self._nodes)
        self._kept: set[fx.Node] = set()

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        return self._by_name[name]

    def has(self, name: str) -> bool:
        """Whether the graph has a node of that name."""
        return name in self._by_name

    def stop_before(self, node: fx.Node) -> None:
        """Run every node in front of `node`; its inputs are then in `values`."""
        while self._nodes[self._position] is not node:
            self.step()

    def run_past(self, nodes: Iterable[fx.Node]) -> None:
        """Run until every one of `nodes` has run."""
        target = max(self._order[node] for node in nodes)
        while self._position <= target:
            self.step()

    def keep(self, nodes: Iterable[fx.Node]) -> None:
        """Hold the values of `nodes` past their last use, until `release`."""
        self._kept.update(nodes)

    def release(self) -> None:
        """Drop values that were held by `keep` and are no longer needed."""
        for node in self._kept:
            if self._last_use.get(node, -1) < self._position:
                self.values.pop(node, None)
        self._kept.clear()

    @torch.no_grad()
    def step(self) -> fx.Node:
        """Run the next node on every chunk and drop what is no longer needed."""
        node = self._nodes[self._position]
        self.values[node] = [self._run(node, i) for i in range(len(self.chunks))]
        for used in {*node.all_input_nodes, node}:
            if self._last_use.get(used, -1) <= self._position and used not in self._kept:
                self.values.pop(used, None)
        self._position += 1
        return node

    def arguments(self, node: fx.Node, chunk: int) -> tuple[Any, dict[str, Any]]:
        """The call arguments of `node` for one chunk."""

        def value(used: fx.Node) -> Any:
            return self.values[used][chunk]

        return fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)

    def _run(self, node: fx.Node, chunk: int) -> Any:
        if node.op == "placeholder":
            index = sum(n.op == "placeholder" for n in self._nodes[: self._position])
            return self.chunks[chunk][index]
        if node.op == "get_attr":
            return attribute(self.gm, str(node.target))
        args, kwargs = self.arguments(node, chunk)
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        return args[0]  # output

    @staticmethod
    def widest(gm: fx.GraphModule) -> int:
        """Bytes per sample of the values alive at once, at most, judged by meta["val"]."""
        first = next(n for n in gm.graph.find_nodes(op="placeholder") if n.meta["val"].dim())
        batch = _hint(first.meta["val"].shape[0])
        nodes = list(gm.graph.nodes)
        last = _last_uses(nodes)
        alive, most = 0, 0
        sizes = {node: _bytes(node.meta.get("val")) for node in nodes}
        ending: dict[int, list[fx.Node]] = {}
        for node, position in last.items():
            ending.setdefault(position, []).append(node)
        for position, node in enumerate(nodes):
            alive += 0 if node.op == "get_attr" else sizes[node]
            most = max(most, alive)
            for done in ending.get(position, ()):
                alive -= 0 if done.op == "get_attr" else sizes[done]
        return -(-most // batch)


def attribute(gm: fx.GraphModule, target: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    last = {node: i for i, node in enumerate(nodes)}
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last[used] = i
    return last


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        count = 1
        for size in value.shape:
            count *= _hint(size)
        return count * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_bytes(item) for item in value)
    return 0


def _hint(size: int | torch.SymInt) -> int:
    """A size, or what a symbolic one was at capture."""
    return size if isinstance(size, int) else int(size.node.hint or 1)
