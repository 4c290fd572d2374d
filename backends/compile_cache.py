"""Keep the results of torch.compile in a file, so that a later start does not compile again."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import re
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TypeVar

import torch

from tfmq_fx.backends.cpu.kernels import processor
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.files import distrusted, make_private, open_trusted, write_whole

logger = logging.getLogger(__name__)
T = TypeVar("T")
_CACHES, _MACHINE = "caches", "machine"  # entries of the file, beside the libraries
_LIBRARY = re.compile(r"[0-9a-z]{2}/[0-9a-z]+(\.main)?\.so")
_CHECK_SIZE = 1024  # bytes of source that Inductor's checks of the compiler stay below


def with_artifact(path: Path, compile_and_run: Callable[[], T]) -> T:
    """Run a call that compiles; read the compiled code from `path`, or write it there.

    The file holds torch's own bundle of compiler caches, and the libraries that the C++ compiler
    made of its code, which torch leaves out: parts that do not fit this machine, torch or model are
    not used, and what is compiled in their place is written. Of a graph with weights packed for
    oneDNN torch keeps nothing: the libraries alone are written. The file is code: what is in it
    runs. Raises ConfigError where `path`, or torch's own cache folder, may have been written by
    others than this user and root, where it holds something else, or cannot be written.
    """
    from torch._dynamo.utils import counters

    if path.is_dir():
        raise ConfigError(f"artifact={str(path)!r} is a folder; name a file")
    _check_folder()
    fits = path.exists() and _read(path)
    before = counters["inductor"]["fxgraph_cache_miss"]
    result = compile_and_run()
    if fits and counters["inductor"]["fxgraph_cache_miss"] == before:
        return result
    bundle, libraries = torch.compiler.save_cache_artifacts(), [*_libraries()]
    if bundle is None and not libraries:
        logger.warning("torch kept nothing of what it compiled: %s is not written", path)
        return result
    try:
        make_private(path.parent)
        write_whole(path, _bundle(bundle[0] if bundle else b"", libraries), mode=0o600)
    except OSError as error:
        raise ConfigError(f"artifact={str(path)!r} cannot be written: {error}") from error
    return result


def _read(path: Path) -> bool:
    """Load the content of the file into torch's caches; returns whether it is from a machine like
    this one."""
    try:
        opened = open_trusted(path)
    except PermissionError as error:
        raise ConfigError(
            f"artifact={str(path)!r} is code that would run in this process, and is not read: "
            f"{error.strerror or error}. Take a file from nobody you do not trust; have it belong "
            "to you, writable by nobody else (chown, chmod 600), or remove it."
        ) from error
    except OSError as error:
        raise ConfigError(f"artifact={str(path)!r} cannot be read: {error}") from error
    try:
        with open(opened, "rb") as content, zipfile.ZipFile(content) as file:
            caches, machine = file.read(_CACHES), file.read(_MACHINE).decode()
            names = [name for name in file.namelist() if name not in (_CACHES, _MACHINE)]
            if odd := [name for name in names if not _LIBRARY.fullmatch(name)]:
                raise ConfigError(
                    f"artifact={str(path)!r} holds {odd[0]!r}, which `compile` writes into no such "
                    "file. Remove it, or name another file."
                )
            libraries = {name: file.read(name) for name in names}
        if caches:
            _check_keys(caches, path)
        loaded = torch.compiler.load_cache_artifacts(caches) if caches else "libraries alone"
        if loaded is None:  # torch has logged why
            raise ValueError("torch cannot unpack its caches")
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"artifact={str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # torch raises whatever its caches raise
        raise ConfigError(
            f"artifact={str(path)!r} holds no compiled model. Remove it, or name another file."
        ) from error
    logger.info("read %s: %s", path, loaded)
    if fits := machine == _machine():
        _unpack(libraries)
    return fits


def _bundle(caches: bytes, libraries: list[Path]) -> bytes:
    """The bytes of the file: torch's caches, the machine's digest and the libraries."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(_CACHES, caches)
        file.writestr(_MACHINE, _machine())
        for library in libraries:
            file.write(library, library.relative_to(_folder()).as_posix())
    return content.getvalue()


def _libraries() -> Iterator[Path]:
    """The libraries that the C++ compiler made for Inductor: the kernels that this process has
    loaded, and the compiler checks, tiny sources that depend on compiler and torch only."""
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
    """Write libraries where Inductor looks for them; their names identify source and options."""
    try:
        for name, content in libraries.items():
            if not (place := _folder() / name).exists():
                make_private(place.parent)
                write_whole(place, content)
    except OSError as error:
        logger.warning("compiled code is not used, the cache cannot be written: %s", error)


def _check_folder() -> None:
    """Raise ConfigError where other users may have written the code that torch loads."""
    try:
        make_private(_folder())
        reason = distrusted(_folder().stat(), writers=stat.S_IWOTH)
    except OSError as error:  # then torch, or who writes there, says so
        logger.warning("torch's cache %s: %s", _folder(), error)
        return
    if reason is not None:
        raise ConfigError(
            f"torch loads code from {_folder()}, and artifact= is not used with it: {reason}. Set "
            "TORCHINDUCTOR_CACHE_DIR to a folder of your own that others cannot write (chmod 700)."
        )


def _check_keys(caches: bytes, path: Path) -> None:
    """Raise ConfigError where torch would write a file outside its cache folder: it joins names
    from the file to that folder unchecked."""
    from torch.compiler._cache import CacheArtifactManager

    entries = CacheArtifactManager.deserialize(caches)
    for each in itertools.chain(*(entries or {}).values()):
        place = PurePath(each.key)
        if place.is_absolute() or ".." in place.parts:
            raise ConfigError(
                f"artifact={str(path)!r} would write to {each.key!r}, out of torch's cache folder. "
                "Remove it, or name another file."
            )


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _machine() -> str:
    """The digest of processor, system and versions that machine code depends on."""
    try:
        name = processor()
    except OSError:
        name = "unknown"
    words = (name, sys.platform, sys.version, torch.__version__)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
