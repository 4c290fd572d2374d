"""The kernels compile for every generation they are meant for, to tensor core instructions, without
a GPU: Triton and ptxas need none."""

import re

import pytest

from tests.triton.compiled.machine_code import (
    ADA,
    AMPERE,
    HOPPER,
    convolution,
    machine_code,
    problem,
)
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.backends.cuda.autotune import TRIED
from tfmq_fx.backends.cuda.kernels import norm
from tfmq_fx.backends.cuda.tiles import candidates

MULTIPLIES = {  # what the tensor cores of a generation are told
    (HOPPER, "int8"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    (HOPPER, "fp8"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3",
    (ADA, "int8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col.*\.s32\.s8\.s8\.s32",
    (ADA, "fp8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32",
    (AMPERE, "int8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col.*\.s32\.s8\.s8\.s32",
}


@pytest.mark.parametrize("generation, format", [*MULTIPLIES, (HOPPER, "int4"), (AMPERE, "int4")])
def test_convolutions_run_on_tensor_cores(generation, format):
    half = 64 if format == "int4" else 0
    capability = divmod(generation, 10)
    core = MULTIPLIES[generation, "fp8" if format == "fp8" else "int8"]  # int4 becomes int8
    spills = []
    for tile in candidates(problem(format, half), capability)[:TRIED]:
        ptx, _, spilled = convolution(generation, tile, format=format)
        assert re.search(core, ptx), "no tensor core instruction of that type"
        assert "cp.async.cg.shared.global" in ptx, "loads of 16 bytes that nothing waits for"
        spills.append(spilled)
    # bytes of registers put into memory: the widest tiles may, the trial tells what they are worth
    assert sum(spilled == 0 for spilled in spills) >= 3, spills
    assert generation != HOPPER or spills[0] == 0, spills


@pytest.mark.parametrize("generation", [HOPPER, ADA, AMPERE])
def test_two_segments_and_sides_that_tiles_do_not_divide(generation):
    small = Tile(64, 64, 64, 8, 1, 4, 3)
    for options in ({"segments": 2, "taps": 1}, {"even": False}):
        ptx, _, spilled = convolution(generation, small, **options)
        assert re.search(MULTIPLIES[generation, "int8"], ptx) and spilled == 0


@pytest.mark.parametrize("generation", [HOPPER, AMPERE])
@pytest.mark.parametrize("dtype", ["i8", "fp8e4nv"])
def test_group_norm_compiles(generation, dtype):
    if dtype == "fp8e4nv" and generation == AMPERE:
        return  # Ampere has no fp8
    floats = {"mean_ptr": "fp32", "square_ptr": "fp32", "x_ptr": "bf16"}
    sizes = {"CHUNK": 256, "BLOCK_P": 32, "BLOCK_C": 64}
    _, _, spilled = machine_code(
        norm.norm_partial_kernel, floats, sizes, {"channels"}, generation, 4, 3
    )
    assert spilled == 0
    names = ("mean", "square", "weight", "bias", "factor", "shift", "a", "b")
    floats = {f"{name}_ptr": "bf16" if name in names[2:6] else "fp32" for name in names}
    sizes = {"CHUNK": 256, "BLOCK_K": 16, "BLOCK_W": 16, "HAS_WEIGHT": True, "HAS_BIAS": True}
    sizes |= {"HAS_FACTOR": True, "HAS_SHIFT": True}
    _, _, spilled = machine_code(
        norm.norm_affine_kernel, floats, sizes, {"channels"}, generation, 2, 3, {"eps": "fp32"}
    )
    assert spilled == 0
    rows = ("factor_ptr", "shift_ptr", "scale0_ptr", "scale1_ptr")
    pointers = dict.fromkeys(rows, "fp32") | {"x_ptr": "bf16", "y_ptr": dtype}
    sizes = {"SILU": True, "RANGES0": 1, "RANGES1": 1, "BLOCK_P": 32, "BLOCK_C": 64}
    divisible = {"channels"}
    ptx, _, spilled = machine_code(
        norm.norm_apply_kernel, pointers, sizes, divisible, generation, 4, 3
    )
    assert spilled == 0
    assert "ld.global.v4" in ptx, "16 bytes of input at a time"
    assert ptx.count("div.rn.f32") >= 2, "scales are inverted as the reference does it"
