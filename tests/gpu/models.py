"""Small denoisers on the device under test, calibrated and converted, and calls of them."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo
from tests.test_end_to_end import answer, fast, redrawn, steps_of
from tfmq_fx import Converted, Prepared, calibrate, convert, prepare
from tfmq_fx.capture.inputs import find_timestep
from tfmq_fx.quant.sqnr import sqnr

DEVICE = os.environ.get("TFMQ_FX_TEST_DEVICE", "cuda")
NAMES = ("ddpm-cifar10", "sd15", "dit-xl-2")
DTYPES = (torch.float32, torch.bfloat16)
Inputs = dict[str, Any]


def like(value: Any, template: Any) -> Any:
    """Tensors of `value`, also in dicts, with the devices and dtypes of `template`."""
    if isinstance(value, dict):
        return {key: like(inner, template[key]) for key, inner in value.items()}
    return value.to(template) if isinstance(value, Tensor) else value


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Tensors of `value` on a device, those of half precision in `dtype` if it is given."""
    if isinstance(value, dict):
        return {key: moved(inner, device, dtype) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    half = value.dtype in (torch.bfloat16, torch.float16)
    return value.to(device=device, dtype=dtype if half and dtype else value.dtype)


@functools.cache
def source(name: str, dtype: torch.dtype) -> nn.Module:
    """The model on the device; not to be changed."""
    return zoo.model(name, dtype=dtype, device=DEVICE)


def calls(name: str, dtype: torch.dtype, batch: int = 2, seed: int = 0) -> Iterator[Inputs]:
    """One call for each step, on the device."""
    model = source(name, dtype)
    generator = torch.Generator().manual_seed(seed)
    template = zoo.inputs(name, model, batch)
    timestep = find_timestep(template, None)
    for step in steps_of(name):
        drawn = {k: redrawn(v, k, batch, generator) for k, v in template.items()}
        yield {**like(drawn, template), timestep: torch.full_like(template[timestep], step)}


@functools.cache
def calibrated(name: str, dtype: torch.dtype) -> Prepared:
    """Prepared and calibrated, for every recipe."""
    model = source(name, dtype)
    prepared = prepare(model, zoo.inputs(name, model), config=fast("w8a8"))
    for seed in (0, 1):
        calibrate(prepared, calls(name, dtype, 5, seed), progress=False)
    return prepared


@functools.cache
def converted(name: str, dtype: torch.dtype, recipe: str) -> Converted:
    """Converted on the device; not to be changed."""
    prepared = calibrated(name, dtype)
    prepared.recipe = fast(recipe)  # what calibration records is the same for every recipe
    return convert(prepared, progress=False)


@functools.cache
def truth(name: str, dtype: torch.dtype) -> nn.Module:
    """The same weights in float32 on the CPU."""
    return copy.deepcopy(source(name, dtype)).cpu().float()


def exact(name: str, dtype: torch.dtype, given: Inputs) -> Tensor:
    """What full precision answers, on the CPU."""
    return answer(truth(name, dtype)(**moved(given, "cpu", torch.float32)))


def told(run: Callable[..., Any], given: Inputs) -> Tensor:
    """The first output, in float32 on the CPU."""
    return answer(run(**given)).float().cpu()


def check_near(
    expected: Tensor, reference: Tensor, found: Tensor, *, dtype: torch.dtype, recipe: str
) -> None:
    """That `found` is what `reference` is, up to how floats are summed. All on the CPU.

    expected: in full precision.  Rounding of floats moves some codes by one: in float32 (2^-20 or
    so of a range of 255 codes) one in 4000, which costs a step squared where every code's own
    rounding costs a twelfth of it: 25 dB less noise than quantization makes; 10 are asked for.
    bfloat16 and fp8 have steps as coarse as the codes themselves, so that answers only have to be
    as near to full precision as the reference is, within 3 dB.
    """
    assert found.isfinite().all()
    noise = sqnr(expected, reference)
    assert sqnr(expected, found) >= noise - 3, (sqnr(expected, found), noise)
    if dtype == torch.float32 and not recipe.startswith("fp8"):
        assert sqnr(reference, found) >= noise + 10, (sqnr(reference, found), noise)
