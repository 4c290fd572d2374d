"""Round weights to codes: to nearest, or second-order in closed form (GPTQ).

Second-order rounding follows GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded in turn
and the error of each is spread over the columns still to come, through the inverse of the Gram
matrix of the layer's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import QParams, levels, quantize, to_fp8

_BLOCK = 128  # columns rounded between two updates of the rest


def round_nearest(weight: Tensor, grid: QParams) -> Tensor:
    """Round `weight` (out, in) to the nearest codes on `grid`, as floats holding integers."""
    scale, zero = grid.over(weight.shape[1])
    if grid.format == "fp8":
        return to_fp8(weight / scale).to(weight.dtype)
    return quantize(weight, scale, zero, grid.bits)


def round_second_order(weight: Tensor, gram: Tensor, grid: QParams, *, damping: float) -> Tensor:
    """Round `weight` to the codes (out, in), as floats, of least second-order output error.

    weight: (out, in) float.  gram: (in, in), Gram matrix of the inputs (any common factor).
    grid: scales and zero points of the output channels.  damping: share of the mean diagonal that
    is added to the diagonal.  Inputs that are always zero are rounded to nearest.
    Columns go in order of falling diagonal, so that what matters most is rounded first.
    """
    order = torch.argsort(gram.diagonal(), descending=True)
    # Rows of this upper factor hold, for each column, how its error spreads over later columns.
    spread = _inverse_root(gram[order][:, order], damping).to(weight.dtype)
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


def refine(
    weight: Tensor, codes: Tensor, gram: Tensor, grid: QParams, *, sweeps: int
) -> tuple[Tensor, QParams]:
    """Improve codes and scales by coordinate descent on the layer's output error.

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
    return codes, QParams(scale, zero, grid.bits)


def _fitted_scale(weight: Tensor, offsets: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    """The least-squares scale (out,) of codes less their zero point, `offsets` (out, in)."""
    seen = offsets @ gram
    power = (seen * offsets).sum(1)
    fitted = (seen * weight).sum(1) / power
    return torch.where((power > 0) & (fitted > 0) & torch.isfinite(fitted), fitted, scale)


def _inverse_root(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular float64 U with U^T U the inverse of the damped `gram`.

    Holds at most three matrices of its size at once, since they may be large.
    """
    system = gram.double().clone()
    mean = float(system.diagonal().mean())
    # relative to the mean even where damping is 0: float64 inverts what is 1e-8 from singular
    system.diagonal().add_(max(damping, 1e-8) * mean if mean > 0 else 1.0)
    system = torch.linalg.cholesky(system)
    system = torch.cholesky_inverse(system)
    root: Tensor = torch.linalg.cholesky(system, upper=True)
    return root
