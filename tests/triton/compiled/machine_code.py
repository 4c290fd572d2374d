"""Kernels compiled to machine code without a GPU: Triton and ptxas need none.

    PYTHONPATH=.triton:. python -m tests.triton.compiled.machine_code

prints what the convolution's tiles take on compute capability 9.0: registers of a thread, bytes of
them put into memory, and products that a program leaves in flight while it goes on.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tfmq_fx.backends.codes.problem import Problem
from tfmq_fx.backends.cuda.kernels.conv import conv_kernel
from tfmq_fx.backends.cuda.tiles import candidates

HOPPER, ADA, AMPERE = 90, 89, 80


def machine_code(kernel, pointers, constants, divisible, generation, warps, stages, others=()):
    """PTX of a kernel, the registers of a thread, and bytes of them that ptxas puts into memory.

    pointers: dtype by argument; other arguments that are no constants are int32, or as in `others`.
    divisible: those that 16 divides.
    """
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
    used, spilled = (
        int(re.search(p, said)[1]) for p in (r"Used (\d+) reg", r"(\d+) bytes spill st")
    )
    return ptx, used, spilled


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
        conv_kernel, pointers, constants, divisible, generation, tile.warps, tile.stages
    )


def problem(format, half=0):
    """A 3x3 convolution of SDXL."""
    return Problem(2, 66, 66, 640, 640, (3, 3), (1, 1), (1, 1), format, half)


def main():
    print(
        f"{'':6} {'tile':>15} {'warps':>5} {'stages':>6} {'registers':>9} {'spilled':>7} in flight"
    )
    for format in ("int8", "fp8", "int4"):
        for tile in candidates(problem(format, 64 if format == "int4" else 0)):
            if tile.split > 1:
                continue
            ptx, used, spilled = convolution(HOPPER, tile, format=format)
            waits = re.findall(r"wgmma\.wait_group\S*\s+(\d+)", ptx)
            flight = max(map(int, waits)) if waits else "-"  # small tiles use mma.sync
            size = f"{tile.m} x {tile.n} x {tile.k}"
            row = f"{format:6} {size:>15} {tile.warps:5} {tile.stages:6} {used:9} {spilled:7}"
            print(f"{row} {flight:>9}")


if __name__ == "__main__":
    main()
