"""Compare values that a graph was captured for with those of a call.

Where a model's code reads the data of a condition (the lengths in a mask), the graph is that of the
example's; a check in it raises InputError for a call with another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from tfmq_fx.core.errors import InputError

from .graph import fork
from .graph_pass import prune
from .subgraphs import extract

EXAMPLES = "held"  # key of a graph's meta: the example's inputs that checks read, by name


@fx.node.has_side_effect
def check_held(actual: Tensor, expected: Tensor, inputs: str, source: str) -> None:
    """Raise InputError unless `actual` equals `expected`, the value it had at capture.

    inputs: the names of the inputs that it is computed from.  source: the line that reads it.
    """
    if isinstance(actual, FakeTensor):
        return  # nothing to compare: only shapes are computed
    if actual.shape != expected.shape or not torch.equal(actual, expected):
        raise InputError(
            f"{inputs or 'the weights'}: forward reads a value computed from it ({source}), and "
            f"the graph was captured where that is {_shown(expected)}; this call has "
            f"{_shown(actual)}. Capture again with such an input among the example inputs."
        )


def checked_sizes(value: Tensor, sizes: Sequence[int | None], path: str) -> Tensor:
    """The tensor that an opaque module returned, if it has the sizes that the graph goes on with.

    sizes: those at capture, None where the graph reads them from the tensor.  path: of the module.
    Raises InputError for others: they depend on the data of the module's inputs.
    """
    if any(b is not None and a != b for a, b in zip(value.shape, sizes, strict=True)):
        raise InputError(
            f"{path}: it returned a tensor {tuple(value.shape)}, and the graph goes on with "
            f"{tuple(sizes)}: its sizes depend on the data of its inputs. Capture again with such "
            "inputs as the example"
        )
    return value


def _shown(value: Tensor) -> str:
    if value.numel() <= 16:
        return str(value.tolist())
    return f"a {value.dtype} tensor {tuple(value.shape)} with the sum {value.sum().item():g}"


def checks(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph that compare values with those at capture."""
    return [node for node in gm.graph.nodes if node.target is check_held]


def checks_alone(gm: fx.GraphModule) -> fx.GraphModule | None:
    """The checks of a graph as a graph of the same inputs, sharing its tensors; None without."""
    nodes = checks(gm)
    return extract(gm, nodes, gm.graph.find_nodes(op="placeholder")) if nodes else None


def without_checks(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without its checks, for those who make them beforehand; `gm` itself without any."""
    if not checks(gm):
        return gm
    bare = fork(gm)
    for node in checks(bare):
        bare.graph.erase_node(node)
    prune(bare.graph)
    bare.recompile()
    return bare


def repeated(example: Tensor, shape: Sequence[int]) -> Tensor:
    """The elements of the example over and over, in another shape."""
    for dim, size in enumerate(shape):
        places = torch.arange(size, device=example.device) % max(example.shape[dim], 1)
        example = example.index_select(dim, places)
    return example.clone()
