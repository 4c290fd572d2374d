"""AdaRound: learn for each weight whether to round up or down (Nagel et al., arXiv 2004.10568).

During reconstruction an `AdaRoundLayer` replaces the quantized layer that is learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.distributed import all_reduce_sum, exchange
from tfmq_fx.core.stages import Stage

from .affine import QParams, levels
from .gptq import round_nearest
from .quant_layer import QuantLayer

GAMMA, ZETA = -0.1, 1.1  # stretch of AdaRound's rectified sigmoid
_WARM_UP = 0.2  # share of the steps without regularization


class SoftRounding:
    """The learnable rounding of one weight: between floor and ceiling, learnt, then decided.

    target: (out, in), the values to round (the weight, or a point near given codes).  Start: the
    soft weight equals `target`, so that deciding at once gives nearest rounding of it.
    """

    def __init__(self, target: Tensor, grid: QParams) -> None:
        self.grid = grid
        self._scale, self._zero = grid.over(target.shape[1])
        position = target / self._scale
        self._floor = torch.floor(position)
        rest = (position - self._floor).clamp(1e-4, 1 - 1e-4)
        alpha = -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)
        self.alpha = alpha.detach().clone().requires_grad_()

    def share(self) -> Tensor:
        """h(alpha) in [0, 1]: how far each weight is rounded up."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft(self) -> Tensor:
        """The present weight (out, in), differentiable in alpha."""
        return (self._codes(self.share()) - self._zero) * self._scale

    def codes(self) -> Tensor:
        """The decided codes: rounded up where alpha >= 0."""
        return self._codes((self.alpha >= 0).to(self._floor.dtype))

    def regularization(self, beta: float) -> Tensor:
        """Mean over weights of 1 - |2 h - 1|^beta: 0 when all are decided."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).mean()

    def decided(self) -> float:
        """Share of weights whose h lies within 0.01 of 0 or 1."""
        with torch.no_grad():
            share = self.share()
            return float(((share < 0.01) | (share > 0.99)).float().mean())

    def _codes(self, share: Tensor) -> Tensor:
        """Codes that lie the fraction `share` above the floor of the target."""
        return (self._floor + share + self._zero).clamp(0, levels(self.grid.bits))


def annealed_beta(step: int, steps: int) -> float | None:
    """AdaRound's exponent at `step` of `steps`, falling linearly from 20 to 2 (released settings of
    TFMQ-DM); None, for no regularization, during the warm-up."""
    begin = _WARM_UP * steps
    if step < begin:
        return None
    return 20 - 18 * (step - begin) / max(steps - begin, 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of a block and the targets of its outputs: each (samples, ...) or (n samples, ...).

    weights: (samples,) of each sample's squared error; None weights all alike.
    share: the fraction of a batch, split among processes, that these samples are; 0 where there
    were too few samples for this process, and these are placeholders.
    """

    inputs: tuple[Any, ...]
    targets: tuple[Tensor, ...]
    weights: Tensor | None = None
    share: float = 1.0

    def residuals(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The errors outputs - targets in float32, each sample times the root of its weight."""
        return [
            self._weighted(out.float() - target.float())
            for out, target in zip(outputs, self.targets, strict=True)
        ]

    def power(self) -> list[Tensor]:
        """The weighted sum of squares of each target: float64, 0-d."""
        return [sum_of_squares(self._weighted(target.float())) for target in self.targets]

    def _weighted(self, value: Tensor) -> Tensor:
        if self.weights is None or not value.dim() or len(value) % len(self.weights):
            return value
        root = self.weights.to(value.device).sqrt()
        root = root.repeat_interleave(len(value) // len(root))
        return value * root.view(-1, *[1] * (value.dim() - 1))


def sum_of_squares(value: Tensor) -> Tensor:
    """The sum of squares in float64, 0-d: squares of float32 overflow beyond 1e19."""
    norm: Tensor = torch.linalg.vector_norm(value, dtype=torch.float64)
    return norm.square()


class AdaRoundLayer(nn.Module):
    """A quantized layer with soft weights, a learnable bias and straight-through input rounding.

    target: (out, ...) values to round: the float weight, or where second-order rounding put it.
    fp8 weights are not learnt: they are the target, and only the bias moves.
    quantize_input: whether x passes the layer's input grid while weights are learnt.
    """

    stage = Stage.QUANTIZED

    def __init__(self, layer: QuantLayer, target: Tensor, *, quantize_input: bool) -> None:
        super().__init__()
        self.layer, self.quantize_input = layer, quantize_input
        self.target, self.shape = target.detach().float(), target.shape
        self.rounding: SoftRounding | None = None
        if layer.weight_format == "int":
            self.rounding = SoftRounding(self.target.flatten(1), layer.grid())
        # in float32: steps of Adam vanish in half precision, and its 1e-8 becomes a division by 0
        bias = None if layer.bias is None else layer.bias.detach().float().clone()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.quantize_input and self.layer.act_bits is not None:
            x = x + (self.layer.quantized_input(x, scale) - x).detach()
        weight = self.target if self.rounding is None else self.rounding.soft().view(self.shape)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.layer.apply_op(x, weight.to(x.dtype), bias)

    def decided(self) -> QuantLayer:
        """A new quantized layer with the learnt rounding and bias."""
        layer = copy.deepcopy(self.layer)
        if self.rounding is not None:
            codes = self.rounding.codes().detach().view(self.shape)
            layer.set_weight(codes, self.rounding.grid)
        if self.bias is not None:
            layer.bias = self.bias.detach().to(layer.dtype).clone()
        return layer


def start_of(layer: QuantLayer, weight: Tensor) -> Tensor:
    """The values (out, ...) at which soft rounding of `layer` starts.

    A layer rounded to nearest starts at its float weight, as AdaRound does.  A layer rounded by
    a better method starts a tenth of a step from its codes, towards the float weight: deciding at
    once returns these codes, and learning may flip those that do not fit.
    fp8 weights are not learnt: the values of their codes.
    """
    if layer.weight_format == "fp8":
        return layer.weight
    rows = weight.detach().float().flatten(1)
    scale, zero = layer.grid().over(rows.shape[1])
    codes = layer.weight_codes().float().flatten(1) + zero
    if torch.equal(codes, round_nearest(rows, layer.grid())):
        return weight.detach().float()
    values, step = layer.weight.flatten(1), 0.1 * scale
    return (values + torch.where(rows > values, step, -step)).view(weight.shape)


def nearest_of(layer: QuantLayer, weight: Tensor, bias: Tensor | None) -> QuantLayer:
    """A copy of `layer` with `bias`, and `weight` rounded to nearest on the layer's grid."""
    nearest, grid = copy.deepcopy(layer), layer.grid()
    codes = round_nearest(weight.detach().float().flatten(1), grid)
    nearest.set_weight(codes.view(weight.shape), grid)
    nearest.bias = None if bias is None else bias.detach().to(layer.dtype).clone()
    return nearest


def with_float_inputs(layer: QuantLayer) -> QuantLayer:
    """A layer that shares the tensors of `layer` and does not quantize its input."""
    shared = copy.copy(layer)
    shared._buffers = dict(layer._buffers)
    shared.act_bits = None
    return shared


def learn(
    forward: Callable[..., Any],
    layers: list[AdaRoundLayer],
    batches: Sequence[Batch],
    *,
    before: float,
    iters: int,
    learning_rate: float,
    regularization: float,
    generator: torch.Generator,
    split: bool = False,
) -> str | None:
    """Learn the rounding of `layers` so that forward(*inputs) gives the targets of `batches`.

    before: the relative squared error of the present rounding.  Loss: relative squared error over
    `before`, plus regularization times the mean rounding term: both of order 1, whatever the size
    of the block and the quality of the start.
    split: whether each process has its share of every batch; all take the steps that one process
    would take, up to the order of sums, and hold the same rounding.
    Returns None, or the reason for stopping early: the loss was NaN or Inf, and `layers` are
    unusable.
    """
    roundings = [layer.rounding for layer in layers if layer.rounding is not None]
    alphas = [rounding.alpha for rounding in roundings]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if not alphas and not biases:
        return None
    optimizer = torch.optim.Adam(
        [
            {"params": alphas, "lr": learning_rate},
            {"params": biases, "lr": learning_rate / 10},
        ]
    )
    sizes = _root_mean_square(batches, split)
    learnt: list[Tensor] = [*alphas, *biases]
    weights = sum(alpha.numel() for alpha in alphas)
    for step in range(iters):
        batch = batches[int(torch.randint(len(batches), (), generator=generator))]
        with torch.enable_grad():
            residuals = batch.residuals(forward(*batch.inputs))
            losses = [(r / size).square().mean() for r, size in zip(residuals, sizes, strict=True)]
            loss = torch.stack(losses).mean() / max(before, 1e-12)
            beta = annealed_beta(step, iters)
            total = loss
            if beta is not None and roundings:
                terms = [
                    rounding.regularization(beta) * (rounding.alpha.numel() / weights)
                    for rounding in roundings
                ]
                total = loss + regularization * torch.stack(terms).sum()
            optimizer.zero_grad()
            (total * batch.share if split else total).backward()
        total = total.detach()
        if split:
            total = _sum_gradients(learnt, total * batch.share)
        if not bool(torch.isfinite(total)):
            return f"the loss became {float(total)} at step {step} of {iters}"
        optimizer.step()
    return None


def _sum_gradients(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Sum the gradients of all processes in place; returns the sum of their losses."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    joined = torch.cat([loss.to(gradients[0])[None], *(g.flatten() for g in gradients)])
    total: Tensor
    total, *parts = all_reduce_sum(joined, "gradients").split([1, *(g.numel() for g in gradients)])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return total[0]


def _root_mean_square(batches: Sequence[Batch], split: bool) -> list[float]:
    """The root mean square of each target over all batches, never 0."""
    powers: list[list[Tensor]] = []
    for batch in batches:
        sizes = [target.numel() for target in batch.targets]
        powers.append([p / n * batch.share for p, n in zip(batch.power(), sizes, strict=True)])
    squares = torch.tensor(powers, dtype=torch.float64)
    if split:
        squares = torch.stack(exchange(squares, "powers of targets")).sum(0)
    return [max(root, 1e-6) for root in squares.mean(0).sqrt().tolist()]
