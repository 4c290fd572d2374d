"""What torch.compile made, kept in a file, so that a later start does not compile again."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from tfmq_fx.backends.cpu.kernels import processor
from tfmq_fx.errors import ConfigError
from tfmq_fx.files import write_whole

logger = logging.getLogger(__name__)
T = TypeVar("T")
_CACHES, _MACHINE = "caches", "machine"  # entries of the file, beside the libraries
_LIBRARY = re.compile(r"[0-9a-z]{2}/[0-9a-z]+(\.main)?\.so")
_CHECK_SIZE = 1024  # bytes of source that Inductor's checks of the compiler stay below


def with_artifact(path: Path, compile_and_run: Callable[[], T]) -> T:
    """The result of a call that compiles, with what it compiles read from `path`, or written to it.

    The file holds torch's own bundle of compiler caches, and the libraries that the C++ compiler
    made of its code, which torch leaves out: parts that do not fit this machine, torch or model are
    not used, and what is compiled in their place is written. Of a graph with weights packed for
    oneDNN torch keeps nothing: the libraries alone are written. Raises ConfigError where `path`
    holds something else, or cannot be written.
    """
    from torch._dynamo.utils import counters

    if path.is_dir():
        raise ConfigError(f"artifact={str(path)!r} is a folder; name a file")
    fits = path.exists() and _read(path)
    before = counters["inductor"]["fxgraph_cache_miss"]
    result = compile_and_run()
    if fits and counters["inductor"]["fxgraph_cache_miss"] == before:
        return result
    made, libraries = torch.compiler.save_cache_artifacts(), [*_libraries()]
    if made is None and not libraries:
        logger.warning("torch kept nothing of what it compiled: %s is not written", path)
        return result
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _bundle(made[0] if made else b"", libraries))
    except OSError as error:
        raise ConfigError(f"artifact={str(path)!r} cannot be written: {error}") from error
    return result


def _read(path: Path) -> bool:
    """Give what the file holds to torch; whether it is of a machine like this one."""
    try:
        with zipfile.ZipFile(path) as file:
            caches, machine = file.read(_CACHES), file.read(_MACHINE).decode()
            names = [name for name in file.namelist() if _LIBRARY.fullmatch(name)]
            libraries = {name: file.read(name) for name in names}
        found = torch.compiler.load_cache_artifacts(caches) if caches else "libraries alone"
    except OSError as error:
        raise ConfigError(f"artifact={str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # torch raises what its caches meet
        raise _no_artifact(path) from error
    if found is None:  # what does not unpack is logged by torch
        raise _no_artifact(path)
    logger.info("read %s: %s", path, found)
    if fits := machine == _machine():
        _unpack(libraries)
    return fits


def _bundle(caches: bytes, libraries: list[Path]) -> bytes:
    """The content of the file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(_CACHES, caches)
        file.writestr(_MACHINE, _machine())
        for library in libraries:
            file.write(library, library.relative_to(_folder()).as_posix())
    return content.getvalue()


def _libraries() -> Iterator[Path]:
    """What the C++ compiler made for Inductor: the kernels that this process has loaded, and the
    checks of what the compiler can do, tiny sources that depend on compiler and torch alone."""
    from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache

    for key in {*CppCodeCache.cache, *CppPythonBindingsCodeCache.cache}:
        if (kernel := _folder() / key[1:3] / f"{key}.main.so").exists():
            yield kernel
    for check in _folder().glob("??/*.so"):
        source = check.with_suffix(".cpp")
        alone = not check.stem.endswith(".main") and source.exists()
        if alone and source.stat().st_size < _CHECK_SIZE:
            yield check


def _unpack(libraries: dict[str, bytes]) -> None:
    """Put libraries where Inductor looks for them, by names that tell source and options."""
    try:
        for name, content in libraries.items():
            if not (place := _folder() / name).exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(place, content)
    except OSError as error:
        logger.warning("compiled code is not used, the cache cannot be written: %s", error)


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _machine() -> str:
    """What machine code depends on beside its source and the compiler's options."""
    try:
        name = processor()
    except OSError:
        name = "unknown"
    words = (name, sys.platform, sys.version, torch.__version__)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _no_artifact(path: Path) -> ConfigError:
    return ConfigError(
        f"artifact={str(path)!r} holds no compiled model. Remove it, or name another file."
    )
