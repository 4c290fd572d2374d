"""The kernels compile for every generation they are meant for, to tensor core instructions, without
a GPU: Triton and ptxas need none."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tfmq_fx.backends.cuda import kernels
from tfmq_fx.backends.cuda.tiles import Problem, Tile, candidates
from tfmq_fx.backends.cuda.trial import TRIED

HOPPER, ADA, AMPERE = 90, 89, 80
MULTIPLIES = {  # what the tensor cores of a generation are told
    (HOPPER, "int8"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    (HOPPER, "fp8"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3",
    (ADA, "int8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col.*\.s32\.s8\.s8\.s32",
    (ADA, "fp8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32",
    (AMPERE, "int8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col.*\.s32\.s8\.s8\.s32",
}


def machine_code(kernel, pointers, constants, divisible, generation, warps, stages, others=()):
    """PTX of a kernel, and what ptxas says of its registers. pointers: dtype by argument; other
    arguments that are no constants are int32, or as in `others`; divisible: those that 16
    divides."""
    names = kernel.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            plain = dict(others).get(name, "i32")
            signature[name] = f"*{pointers[name]}" if name in pointers else plain
            if name in pointers or name in divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    ptx = triton.compile(source, GPUTarget("cuda", generation, 32), options).asm["ptx"]
    ptxas = Path(triton.backends.nvidia.__file__).with_name("bin") / "ptxas"
    target = re.search(r"\.target (\S+)", ptx)[1].rstrip(",")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return ptx, int(re.search(r"(\d+) bytes spill stores", said)[1])


def convolution(generation, tile, *, format="int8", taps=3, segments=1, even=True, half=64):
    codes = "fp8e4nv" if format == "fp8" else "i8"
    half = half if format == "int4" else 0
    weights = "u8" if half else codes
    pointers = {"bias_ptr": "bf16", "row_ptr": "bf16", "residual_ptr": "bf16", "y_ptr": "bf16"}
    pointers["out_scale_ptr"] = "fp32"
    for i in range(2):
        pointers |= {f"x{i}_ptr": codes, f"w{i}_ptr": weights, f"zero{i}_ptr": "u8"}
        pointers |= {f"offset{i}_ptr": "i32", f"scale{i}_ptr": "fp32"}
        pointers[f"weight_scale{i}_ptr"] = "fp32"
    constants = {
        "TAPS_Y": taps,
        "TAPS_X": taps,
        "STRIDE_Y": 1,
        "STRIDE_X": 1,
        "DILATION_Y": 1,
        "DILATION_X": 1,
        "SEGMENTS": segments,
        "HALF0": half,
        "HALF1": half,
        "FLOAT": format == "fp8",
        "HAS_BIAS": True,
        "HAS_ROW": True,
        "HAS_RESIDUAL": True,
        "REQUANTIZE": False,
        "WIDE": False,
        "EVEN0": even,
        "EVEN1": even,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": tile.group,
        "SPLIT": tile.split,
    }
    divisible = {"channels0", "channels1", "pixel_stride0", "pixel_stride1", "out_channels"}
    divisible |= {"tap_stride0", "tap_stride1", "rows", "rows_per_sample", "rows_per_range0"}
    return machine_code(
        kernels.conv_kernel, pointers, constants, divisible, generation, tile.warps, tile.stages
    )


def problem(format, half=0):
    return Problem(2, 66, 66, 640, 640, (3, 3), (1, 1), (1, 1), format, half)


@pytest.mark.parametrize("generation, format", [*MULTIPLIES, (HOPPER, "int4"), (AMPERE, "int4")])
def test_convolutions_run_on_tensor_cores(generation, format):
    half = 64 if format == "int4" else 0
    capability = divmod(generation, 10)
    core = MULTIPLIES[generation, "fp8" if format == "fp8" else "int8"]  # int4 becomes int8
    spills = []
    for tile in candidates(problem(format, half), capability)[:TRIED]:
        ptx, spilled = convolution(generation, tile, format=format)
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
        ptx, spilled = convolution(generation, small, **options)
        assert re.search(MULTIPLIES[generation, "int8"], ptx) and spilled == 0


@pytest.mark.parametrize("generation", [HOPPER, AMPERE])
@pytest.mark.parametrize("dtype", ["i8", "fp8e4nv"])
def test_group_norm_compiles(generation, dtype):
    if dtype == "fp8e4nv" and generation == AMPERE:
        return  # Ampere has no fp8
    floats = {"mean_ptr": "fp32", "square_ptr": "fp32", "x_ptr": "bf16"}
    sizes = {"CHUNK": 256, "BLOCK_P": 32, "BLOCK_C": 64}
    _, spilled = machine_code(
        kernels.norm_partial_kernel, floats, sizes, {"channels"}, generation, 4, 3
    )
    assert spilled == 0
    names = ("mean", "square", "weight", "bias", "factor", "shift", "a", "b")
    floats = {f"{name}_ptr": "bf16" if name in names[2:6] else "fp32" for name in names}
    sizes = {"CHUNK": 256, "BLOCK_K": 16, "BLOCK_W": 16, "HAS_WEIGHT": True, "HAS_BIAS": True}
    sizes |= {"HAS_FACTOR": True, "HAS_SHIFT": True}
    _, spilled = machine_code(
        kernels.norm_affine_kernel, floats, sizes, {"channels"}, generation, 2, 3, {"eps": "fp32"}
    )
    assert spilled == 0
    rows = ("factor_ptr", "shift_ptr", "scale0_ptr", "scale1_ptr")
    pointers = dict.fromkeys(rows, "fp32") | {"x_ptr": "bf16", "y_ptr": dtype}
    sizes = {"SILU": True, "RANGES0": 1, "RANGES1": 1, "BLOCK_P": 32, "BLOCK_C": 64}
    divisible = {"channels"}
    ptx, spilled = machine_code(
        kernels.norm_apply_kernel, pointers, sizes, divisible, generation, 4, 3
    )
    assert spilled == 0
    assert "ld.global.v4" in ptx, "16 bytes of input at a time"
    assert ptx.count("div.rn.f32") >= 2, "scales are inverted as the reference does it"
