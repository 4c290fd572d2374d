"""Cut a graph in two so that the fewest bytes have to be stored between the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from torch import Tensor, fx

from .graph_pass import Declined
from .node_info import size_hint
from .subgraphs import reads_tensor


def minimum_cut(
    graph: fx.Graph,
    early: Collection[fx.Node],
    *,
    heavy: Collection[fx.Node],
    obstacles: Mapping[fx.Node, str],
    cost: Callable[[fx.Node], int],
) -> tuple[tuple[fx.Node, ...], list[Declined]]:
    """The cheapest values of `early` that separate `heavy` from the other nodes, in graph order.

    early: nodes that may be computed before the rest.  heavy: early nodes that the rest must not
    compute.  obstacles: why a value cannot be stored.  cost: of storing a value, > 0.
    Declined are the values that the rest has to compute although they are heavy, with the obstacle.
    """
    import networkx as nx

    declined, network = [], nx.DiGraph()
    stuck = dict[fx.Node, bool]()  # heavy or computed from heavy: does no cut lie between?
    for node in graph.nodes:
        if node not in early or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            continue  # sizes are computed again, not stored
        sources = [used for used in node.all_input_nodes if used in stuck]
        if node not in heavy and not sources:
            continue
        obstacle = obstacles.get(node)
        stuck[node] = obstacle is not None and (
            node in heavy or any(stuck[used] for used in sources)
        )
        # Edges run from readers to what they read: of several minimum cuts networkx then gives the
        # one next to the heavy operations, whose values are named after the module that makes them.
        network.add_edge(
            (node, "out"), (node, "in"), **({} if obstacle else {"capacity": cost(node)})
        )
        network.add_edges_from(((node, "in"), (used, "out")) for used in sources)
        if node in heavy:
            network.add_edge((node, "in"), "heavy")
        if any(user not in early and reads_tensor(user) for user in node.users):
            if stuck[node]:
                declined.append(Declined(node.name, f"cannot be stored: {obstacle}"))
            else:
                network.add_edge("rest", (node, "out"))
    if "heavy" not in network or "rest" not in network:
        return (), declined
    _, (_, behind) = nx.minimum_cut(network, "rest", "heavy")
    cut = tuple(node for node in stuck if (node, "in") in behind and (node, "out") not in behind)
    return cut, declined


def stored_bytes(node: fx.Node) -> int:
    """The bytes of a value for one sample, with free sizes as captured."""
    value: Tensor = node.meta["val"]
    sizes = [size_hint(n) for n in value.shape]
    if value.dim() and not isinstance(value.shape[0], int):
        sizes[0] = int(value.shape[0].node.expr.as_coeff_Mul()[0])  # rows for each sample
    return max(1, math.prod(sizes) * value.element_size())
