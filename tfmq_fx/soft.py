"""A layer whose rounding is being learnt: stands in for a quantized layer during reconstruction."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .affine import QParams
from .dialect import Stage
from .errors import CalibrationError
from .nn import QuantLayer
from .rounding import SoftRounding, annealed_beta, round_nearest


class SoftLayer(nn.Module):
    """A quantized layer with soft weights, a learnable bias and straight-through input rounding.

    target: (out, ...) values to round: the float weight, or where second-order rounding put it.
    quantize_input: whether x passes the layer's input grid while weights are learnt.
    """

    stage = Stage.QUANTIZED

    def __init__(self, layer: QuantLayer, target: Tensor, *, quantize_input: bool) -> None:
        super().__init__()
        self.layer, self.quantize_input = layer, quantize_input
        self.shape = target.shape
        grid = QParams(layer.weight_scale, layer.weight_zero.float(), layer.weight_bits)
        self.rounding = SoftRounding(target.detach().float().flatten(1), grid)
        # in float32: steps of Adam vanish in half precision, and its 1e-8 becomes a division by 0
        bias = None if layer.bias is None else layer.bias.detach().float().clone()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.quantize_input and self.layer.act_bits is not None:
            x = x + (self.layer.quantized_input(x, scale) - x).detach()
        weight = self.rounding.soft().view(self.shape)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.layer.apply_op(x, weight.to(x.dtype), bias)

    def decided(self) -> QuantLayer:
        """A new quantized layer with the rounding learnt and the bias learnt."""
        made = copy.deepcopy(self.layer)
        codes = self.rounding.codes().detach().view(self.shape)
        made.set_weight(codes, self.rounding.grid)
        if self.bias is not None:
            made.bias = self.bias.detach().to(made.dtype).clone()
        return made


def start_of(layer: QuantLayer, weight: Tensor) -> Tensor:
    """Where soft rounding of `layer` starts.

    A layer rounded to nearest starts at its float weight, as AdaRound does.  A layer that was
    rounded by something better starts a tenth of a step from its codes, on the side of the float
    weight: deciding at once gives the codes back, and learning may flip what does not fit.
    """
    shape = (-1, *[1] * (weight.dim() - 1))
    weight = weight.detach().float()
    grid = QParams(layer.weight_scale, layer.weight_zero.float(), layer.weight_bits)
    nearest = round_nearest(weight.flatten(1), grid).view(weight.shape)
    codes = layer.weight_codes().float() + layer.weight_zero.float().view(shape)
    if torch.equal(codes, nearest):
        return weight
    step = 0.1 * layer.weight_scale.view(shape)
    return layer.weight + torch.where(weight > layer.weight, step, -step)


def learn(
    forward: nn.Module,
    layers: list[SoftLayer],
    batches: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    *,
    before: float,
    iters: int,
    learning_rate: float,
    regularization: float,
    generator: torch.Generator,
    name: str,
) -> None:
    """Learn the rounding of `layers` so that forward(*inputs) gives the targets of `batches`.

    before: the relative squared error of the rounding that there is.  Loss: relative squared error
    over `before`, plus regularization times the mean rounding term: both of order 1, whatever the
    unit's size and however good the start.  Raises CalibrationError if the loss becomes NaN.
    """
    alphas = [layer.rounding.alpha for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    optimizer = torch.optim.Adam(
        [
            {"params": alphas, "lr": learning_rate},
            {"params": biases, "lr": learning_rate / 10},
        ]
    )
    power = _mean_square(batches)
    weights = sum(alpha.numel() for alpha in alphas)
    for step in range(iters):
        inputs, targets = batches[int(torch.randint(len(batches), (), generator=generator))]
        with torch.enable_grad():
            outputs = forward(*inputs)
            losses = [
                (out.float() - target.float()).square().mean() / scale
                for out, target, scale in zip(outputs, targets, power, strict=True)
            ]
            loss = torch.stack(losses).mean() / max(before, 1e-12)
            beta = annealed_beta(step, iters)
            total = loss
            if beta is not None:
                terms = [
                    layer.rounding.regularization(beta) * (alpha.numel() / weights)
                    for layer, alpha in zip(layers, alphas, strict=True)
                ]
                total = loss + regularization * torch.stack(terms).sum()
            optimizer.zero_grad()
            total.backward()
        if not bool(torch.isfinite(total.detach())):
            raise CalibrationError(f"reconstruction of {name} became NaN; lower the learning rate")
        optimizer.step()


def _mean_square(batches: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> list[Tensor]:
    """Mean square of each target over all batches, never 0."""
    count = len(batches[0][1])
    return [
        torch.stack([targets[i].float().square().mean() for _, targets in batches])
        .mean()
        .clamp(min=1e-12)
        for i in range(count)
    ]
