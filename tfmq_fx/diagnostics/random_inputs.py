"""Draw random inputs, from a seed, on which a model is compared with its reference."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.capture.input_checks import BATCH, Input
from tfmq_fx.ir.held_values import EXAMPLES, repeated
from tfmq_fx.ir.node_info import is_view, op_name
from tfmq_fx.ir.verifier import is_timestep_row

Example = list[Tensor]  # placeholder values, in order
_CASTS = ("long", "int", "short")
# what rewrites of a layer put in front of it
_REWRITES = (torch.narrow, torch.unflatten, torch.flatten, torch.mul, torch.matmul)


class RandomInputs:
    """Random placeholder values for `model`, a graph that is called by `call`, over `timesteps`
    (K,).

    The batch is 1 where it is free, other free sizes are those of the capture.  Floats are standard
    normal, integers uniform over the rows of the embedding that looks them up, 0 where none is
    known; booleans are true, and masks by name 1, for nothing is masked.  Inputs of held
    values are the example's.
    """

    def __init__(
        self, model: fx.GraphModule, call: CallSpec, timesteps: Tensor, *, seed: int
    ) -> None:
        self.call, self.timesteps = call, timesteps
        self.generator = torch.Generator().manual_seed(seed)
        nodes = dict(zip(call.names, model.graph.find_nodes(op="placeholder"), strict=True))
        self.sizes = {spec.name: _sizes(spec, nodes[spec.name]) for spec in call.inputs}
        self.widths = {
            name: relative_widths(model, node, len(timesteps))
            for name, node in nodes.items()
            if name not in call.conditions
        }
        self.rows: Mapping[str, int] = {}
        self.held: Mapping[str, Tensor] = model.meta.get(EXAMPLES, {})

    def example(self, step: int, conditions: Mapping[str, Tensor]) -> Example:
        """The placeholder values at the timestep at position `step` of the set.

        Floats are as wide as `relative_widths` says: images with little noise do not span what pure
        noise does, and no model is to be judged by what it clips there.
        """
        values = []
        for spec in self.call.inputs:
            if spec.name == self.call.timestep:
                count = spec.shape[0] if isinstance(spec.shape[0], int) else 1
                t = self.timesteps[step]
                values.append(t.to(device=spec.device, dtype=spec.dtype).repeat(count))
            elif spec.name == self.call.per_token:
                values.append(torch.full_like(self.value(spec), float(self.timesteps[step])))
            elif spec.name in conditions:
                values.append(conditions[spec.name])
            else:
                value, widths = self.value(spec), self.widths.get(spec.name)
                if widths is not None and spec.dtype.is_floating_point:
                    value = value * widths[step].to(value)
                values.append(value)
        return values

    def conditions(self) -> dict[str, Tensor]:
        """One value of each input that is the same in every step of a request."""
        specs = [spec for spec in self.call.inputs if spec.name in self.call.conditions]
        return {spec.name: self.value(spec) for spec in specs}

    def value(self, spec: Input) -> Tensor:
        """A value of one placeholder."""
        sizes = self.sizes[spec.name]
        if spec.name in self.held:
            return repeated(self.held[spec.name], sizes).to(device=spec.device, dtype=spec.dtype)
        if spec.dtype.is_floating_point:
            value = torch.randn(sizes, dtype=torch.float32, generator=self.generator)
        elif spec.dtype == torch.bool or ("mask" in spec.path and spec.name not in self.rows):
            value = torch.ones(sizes, dtype=torch.float32)
        else:
            value = torch.randint(self.rows.get(spec.name, 1), sizes, generator=self.generator)
        return value.to(device=spec.device, dtype=spec.dtype)


def draw_examples(draw: RandomInputs, *, conditions: int, every: bool) -> list[Example]:
    """Examples over all timesteps.

    conditions: how many values are drawn of the inputs besides sample and timestep; the timesteps
    take them in turn, or, where `every`, there is an example for each timestep and each of them.
    """
    drawn = [draw.conditions() for _ in range(conditions if draw.call.conditions else 1)]
    steps = range(len(draw.timesteps))
    if every:
        return [draw.example(step, each) for each in drawn for step in steps]
    return [draw.example(step, drawn[step % len(drawn)]) for step in steps]


def join(call: CallSpec, examples: Sequence[Example]) -> Example | None:
    """The examples as one batch; None where they do not share what carries no batch."""
    joined = []
    for spec, values in zip(call.inputs, zip(*examples, strict=True), strict=True):
        if spec.shape and spec.shape[0] == BATCH:
            if len({value.shape[1:] for value in values}) > 1:
                return None
            joined.append(torch.cat(values))
        elif all(value is values[0] or torch.equal(value, values[0]) for value in values):
            joined.append(values[0])
        else:
            return None
    return joined


def batches(call: CallSpec, examples: Sequence[Example], size: int) -> list[Example]:
    """The examples in order, at most `size` joined where they can be."""
    result: list[Example] = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        joined = join(call, part)
        result += part if joined is None else [joined]
    return result


def rows_of(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The number of rows of the embedding that looks up `node`, perhaps through views and casts;
    the smallest of several, None where there is none."""
    counts: list[int] = []
    for user in node.users:
        if user.op == "call_module":
            module = gm.get_submodule(str(user.target))
            counts += [module.num_embeddings] if isinstance(module, nn.Embedding) else []
        elif op_name(user) == "embedding":
            weights = [n for n in user.all_input_nodes if n.op == "get_attr" and n is not node]
            counts += [len(operator.attrgetter(str(n.target))(gm)) for n in weights]
        elif (is_view(user) or op_name(user) in _CASTS) and user.all_input_nodes[:1] == [node]:
            counts += [rows for rows in [rows_of(gm, user)] if rows]
    return min(counts, default=None)


def _sizes(spec: Input, node: fx.Node) -> list[int]:
    shape = node.meta["val"].shape
    return [
        size if isinstance(size, int) else 1 if size == BATCH else known.node.hint
        for size, known in zip(spec.shape, shape, strict=True)
    ]


def relative_widths(model: fx.GraphModule, placeholder: fx.Node, timesteps: int) -> Tensor | None:
    """The width of an input at each timestep relative to the widest, (K,), at most 1.

    It is the largest among the scales of the layers that read the input, as it is or rewritten;
    None where none of them has a scale for each of K timesteps.
    """
    widths = []
    for node in model.graph.find_nodes(op="call_module"):
        x, scale = (*node.args, None, None)[:2]
        while isinstance(x, fx.Node) and x.target in _REWRITES:
            x = x.all_input_nodes[0]
        if x is not placeholder or not isinstance(scale, fx.Node):
            continue
        row, place = scale.args if scale.target is operator.getitem else (None, None)
        if isinstance(row, fx.Node) and is_timestep_row(row) and isinstance(place, tuple):
            table = model.get_buffer(str(row.all_input_nodes[0].target))
            column = table[:, cast(int, place[1])]
            if len(column) == timesteps and bool((column.isfinite() & (column > 0)).all()):
                widths.append(column / column.max())
    return torch.stack(widths).amax(0) if widths else None
