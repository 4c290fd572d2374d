"""Compile `kernels.cpp` once for each machine, keep the library, and load it.

It is kept in `cache_folder()`, by source, options, compiler, torch and processor (compiling takes
about ten seconds). What is loaded runs in this process, so a folder or file that others could have
written is refused.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.files import cache_folder, make_private, open_trusted
from tfmq_fx.core.temporary_files import folder_beside

SOURCE = Path(__file__).with_name("kernels.cpp")
# products and sums are those that are written: the same results of every compiler and build
_COMMON = ("-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-fopenmp")
NATIVE = ("-O3", "-march=native", *_COMMON)
PLAIN = ("-O1", "-march=x86-64", "-msse4.1", "-DTFMQ_FX_PLAIN", "-Wno-psabi", *_COMMON)


def load(options: tuple[str, ...], processor: str) -> None:
    """Load the library for compiler `options` and a `processor`, compiled if it is not there yet.

    Raises BackendError with what the compiler says where it fails.
    """
    path = library(options, processor)
    try:
        make_private(path.parent)
    except OSError as error:
        raise _unkept(path, error) from error
    folder = _trusted(path.parent)
    try:
        if not path.exists():
            _compile(path, options)
        os.close(_trusted(path, folder))
        # By way of the folder that was looked at, which nobody else can write: not by its name,
        # where others may have put another.
        ctypes.CDLL(f"/proc/self/fd/{folder}/{path.name}")
    except OSError as error:
        raise BackendError(f"{path} does not load: {error}. Remove it.") from error
    finally:
        os.close(folder)


def sources() -> str:
    """The source text of the kernels."""
    return "\n".join(p.read_text() for p in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))


def library(options: tuple[str, ...], processor: str) -> Path:
    """The path of the library for compiler `options` and a `processor`."""
    try:
        compiler = _compiler()
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except Exception as error:  # Inductor raises its own InvalidCxxCompiler, a private type
        raise BackendError(
            f"the CPU kernels need a C++ compiler, and none runs here ({type(error).__name__}: "
            f"{error}). Install g++ or clang++, or set CXX."
        ) from error
    words = (sources(), *options, version, torch.__version__, processor, sys.version)
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return cache_folder() / f"cpu-kernels-{digest}.so"


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def _compile(path: Path, options: tuple[str, ...]) -> None:
    root = Path(torch.__file__).parent
    include, lib = root / "include", root / "lib"
    abi = int(torch.compiled_with_cxx11_abi())
    command = [_compiler(), *options, f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={abi}", str(SOURCE)]
    command += [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    try:
        with folder_beside(path, "new") as folder:  # the compiler makes a file of its own
            built = folder / "made.so"
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
            if done.returncode:
                raise BackendError(
                    f"{SOURCE.name} does not compile:\n{done.stderr.strip()[-2000:]}"
                )
            built.chmod(0o644)  # whatever the umask, for others to read at most
            os.replace(built, path)
    except OSError as error:
        raise _unkept(path, error) from error


def _trusted(path: Path, folder: int | None = None) -> int:
    """Open the cache folder, or the library in it; returns a descriptor. Raises BackendError where
    others could have written it."""
    try:
        return open_trusted(path if folder is None else path.name, within=folder)
    except OSError as error:
        raise BackendError(
            f"{path} holds code that would run in this process, and is not used: "
            f"{error.strerror or error}. Remove it, or set TFMQ_FX_CACHE to a folder of your own "
            "that others cannot write (chmod 700)."
        ) from error


def _unkept(path: Path, error: OSError) -> BackendError:
    return BackendError(
        f"the CPU kernels cannot be kept in {path.parent}: {error}. Set TFMQ_FX_CACHE to a folder "
        "that can be written."
    )
