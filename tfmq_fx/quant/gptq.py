"""How weights are rounded to codes: to the nearest, and second-order rounding in closed form.

Second-order rounding follows GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded in turn
and the error of each is spread over the columns still to come, through the inverse of the Gram
matrix of the layer's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import QParams, levels, quantize, to_fp8

_BLOCK = 128  # columns rounded between two updates of the rest


@dataclass(frozen=True, slots=True)
class Refined:
    """Codes (out, in) as floats holding integers, and the grid they are on."""

    codes: Tensor
    grid: QParams


def round_nearest(weight: Tensor, grid: QParams) -> Tensor:
    """Codes (out, in) nearest to `weight` (out, in) on `grid` (one row per channel), as floats."""
    scale, zero = grid.over(weight.shape[1])
    if grid.format == "fp8":
        return to_fp8(weight / scale).to(weight.dtype)
    return quantize(weight, scale, zero, grid.bits)


def round_second_order(weight: Tensor, gram: Tensor, grid: QParams, *, damping: float) -> Tensor:
    """Codes (out, in) for `weight`, as floats holding integers, that minimise the layer's output
    error to second order.

    weight: (out, in) float.  gram: (in, in), Gram matrix of the inputs (any common factor).
    grid: scales and zero points of the output channels.  damping: share of the mean diagonal that
    is added to the diagonal.  Inputs that are always zero are rounded to nearest.
    Columns go in order of falling diagonal, so that what matters most is rounded first.
    """
    order = torch.argsort(gram.diagonal(), descending=True)
    # Rows of this upper factor hold, for each column, how its error spreads over later columns.
    spread = _inverse_root(_damped(gram[order][:, order], damping)).to(weight.dtype)
    work = weight[:, order].clone()
    codes = torch.empty_like(work)
    scale, zero = (part.to(work.dtype).expand_as(work)[:, order] for part in grid.over(len(order)))
    top = levels(grid.bits)
    for start in range(0, work.shape[1], _BLOCK):
        stop = min(start + _BLOCK, work.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for i in range(start, stop):
            column = work[:, i]
            step, offset = scale[:, i], zero[:, i]
            code = (torch.round(column / step) + offset).clamp(0, top)
            codes[:, i] = code
            error = (column - (code - offset) * step) / spread[i, i]
            work[:, i + 1 : stop] -= error[:, None] * spread[i, i + 1 : stop]
            errors[:, i - start] = error
        work[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes[:, torch.argsort(order)]


def refine(weight: Tensor, codes: Tensor, gram: Tensor, grid: QParams, *, sweeps: int) -> Refined:
    """Better codes and scales by coordinate descent on the layer's output error.

    weight: (out, in) float.  codes: (out, in) to start from.  gram: (in, in), Gram matrix of the
    inputs.  Minimises tr((What - W) gram (What - W)^T): each sweep gives every scale its least
    squares value for the codes (where it has one scale per channel), then every column in turn the
    best code for what the others are.  The error never rises.
    """
    gram = gram.to(weight.dtype)
    diagonal = gram.diagonal().clamp(min=1e-12 * float(gram.diagonal().mean()) + 1e-30)
    top, scale, zero = levels(grid.bits), grid.scale.clone(), grid.zero
    codes = codes.clone()
    for _ in range(sweeps):
        if scale.dim() == 1:
            scale = _fitted_scale(weight, codes - zero[:, None], gram, scale)
        steps, zeros = (
            part.expand_as(codes) for part in QParams(scale, zero, grid.bits).over(codes.shape[1])
        )
        slope = ((codes - zeros) * steps - weight) @ gram  # of the error, halved
        for start in range(0, codes.shape[1], _BLOCK):
            stop = min(start + _BLOCK, codes.shape[1])
            moved = torch.empty_like(codes[:, start:stop])
            for i in range(start, stop):
                step, offset = steps[:, i], zeros[:, i]
                held = (codes[:, i] - offset) * step
                best = held - slope[:, i] / diagonal[i]
                code = (torch.round(best / step) + offset).clamp(0, top)
                change = (code - codes[:, i]) * step
                codes[:, i], moved[:, i - start] = code, change
                slope[:, i:stop] += change[:, None] * gram[i, i:stop]
            slope[:, stop:] += moved @ gram[start:stop, stop:]
    return Refined(codes, QParams(scale, zero, grid.bits))


def _fitted_scale(weight: Tensor, offsets: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    """The scale (out,) of integer `offsets` (out, in) that comes nearest to the weight's output."""
    seen = offsets @ gram
    power = (seen * offsets).sum(1)
    fitted = (seen * weight).sum(1) / power
    return torch.where((power > 0) & (fitted > 0) & torch.isfinite(fitted), fitted, scale)


def _inverse_root(system: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of `system`, positive definite; no more than
    two further matrices of its size are held at once. Raises LinAlgError where it is not."""
    factor = torch.linalg.cholesky(system)
    inverse = torch.cholesky_inverse(factor)
    del factor
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root


def _damped(gram: Tensor, damping: float) -> Tensor:
    """`gram` in float64 with the damping on its diagonal; never singular."""
    system = gram.double().clone()
    mean = float(system.diagonal().mean())
    # relative to the mean even where damping is 0: float64 inverts what is 1e-8 from singular
    system.diagonal().add_(max(damping, 1e-8) * mean if mean > 0 else 1.0)
    return system
