"""Count the floating-point operations of each node of a graph, with torch on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tfmq_fx.ir.graph import opaque_modules
from tfmq_fx.ir.node_info import size_hint

Shape = tuple[int, ...]


def node_flops(gm: fx.GraphModule, shapes: Sequence[Shape]) -> dict[fx.Node, int]:
    """The number of operations of every node that has any, for inputs of these shapes, in
    placeholder order.

    Counted: matrix products, convolutions and attention, two for each multiply-add; element-wise
    operations, norms and embedding look-ups count as none, as is usual; nor do opaque modules, as
    what their code does depends on data.  Nothing is computed.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    run = _Counting(gm, counter)
    # MultiheadAttention's fused kernels are opaque to the counter, its plain path is not.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), mode:
            inputs = [
                torch.empty(shape, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
                for node, shape in zip(gm.graph.find_nodes(op="placeholder"), shapes, strict=True)
            ]
            with counter:
                run.run(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return run.flops


class _Counting(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(gm)
        self.counter = counter
        self.flops: dict[fx.Node, int] = {}
        self.opaque = {
            n for p in opaque_modules(gm) for n in gm.graph.find_nodes(op="call_module", target=p)
        }

    def run_node(self, n: fx.Node) -> Any:
        if n in self.opaque:
            return tree_map_only(Tensor, _as_captured, n.meta["val"])
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        if spent := self.counter.get_total_flops() - before:
            self.flops[n] = spent
        return result


def _as_captured(value: Tensor) -> Tensor:
    """A tensor like a traced one, at the sizes of the capture."""
    sizes = [size_hint(size) for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _matrix_vector(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


# what torch 2.13 has no formula for
_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _attention,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: lambda bias, matrix, *_, **__: _matrix_vector(matrix),
}
