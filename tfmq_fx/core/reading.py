"""Files that somebody else may have written: read without hanging, parsed without surprises.

What a file costs to refuse is bounded by its size: its kind is checked before it is opened, its
nesting and its numbers before or while it is parsed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import ArtifactError

JSON_BYTES = 1 << 28  # a graph of 10,000 nodes takes some MiB
DEPTH = 128  # of nested lists and objects; Python's own limit on calls is ten times that
_HOLLOW = 16  # a file that is mostly holes takes so many times longer to read than to send
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))


def open_regular(path: Path, limit: int | None = None) -> BufferedReader:
    """The file at `path`, open for reading; links are followed.

    Raises ArtifactError where it is a pipe, a device or a directory, where it is mostly holes, or
    where it has more than `limit` bytes, and OSError where it cannot be opened.
    """
    _check_regular(path, os.stat(path).st_mode)  # opening a device may already do something
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    file: BufferedReader = os.fdopen(descriptor, "rb")
    try:
        found = os.fstat(file.fileno())
        _check_regular(path, found.st_mode)
        if limit is not None and found.st_size > limit:
            raise ArtifactError(f"{path} has {found.st_size} bytes, and at most {limit} are read")
        if found.st_size > 1 << 24 and _data_bytes(file.fileno()) * _HOLLOW < found.st_size:
            raise ArtifactError(f"{path} claims {found.st_size} bytes, but nearly all are holes")
    except BaseException:
        file.close()
        raise
    return file


def read_json(path: Path, limit: int = JSON_BYTES, *, nan: bool = False) -> Any:
    """The JSON value in the file at `path`. Raises ArtifactError naming the file, and OSError where
    it cannot be opened."""
    with open_regular(path, limit) as file:
        return parse_json(file.read(), str(path), nan=nan)


def parse_json(content: bytes | str, where: str, *, nan: bool = False) -> Any:
    """The value of a JSON text as Python's own `json` writes it, in UTF-8.

    nan: whether NaN and Infinity are numbers.  Raises ArtifactError, naming `where`, on anything
    else: a key given twice, a number that no 64 bits hold, nesting deeper than 128.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    check_depth(data, where)

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ArtifactError(f"{where}: the number {text:.40} is out of range")
        return value

    def integer(text: str) -> int:
        value = int(text) if len(text) <= 21 else 1 << 65
        if abs(value) >= 1 << 64:
            raise ArtifactError(f"{where}: the number {text:.40} is out of range")
        return value

    def constant(text: str) -> Any:
        if nan:
            return float(text)
        raise ArtifactError(f"{where}: {text} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise ArtifactError(f"{where}: the key {twice!r:.80} is given twice")
        return made

    try:
        return json.loads(
            data.decode("utf-8"),
            parse_float=number,
            parse_int=integer,
            parse_constant=constant,
            object_pairs_hook=unique,
        )
    except ValueError as error:
        raise ArtifactError(f"{where} is truncated or not JSON: {error}") from error


def check_depth(data: bytes, where: str) -> None:
    """Raise ArtifactError where a JSON text is nested deeper than 128 levels."""
    brackets = _STRING.sub(b"", data).translate(None, _OTHERS)
    deepest: Iterable[int] = itertools.accumulate(map(_BRACKETS.__getitem__, brackets))
    if max(deepest, default=0) > DEPTH:
        raise ArtifactError(f"{where} is nested deeper than {DEPTH} levels")


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
        raise ArtifactError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, no file")


def _data_bytes(descriptor: int) -> int:
    """Bytes of a file that are not holes, or about as many; holes are not known everywhere."""
    size, place, found = os.fstat(descriptor).st_size, 0, 0
    try:
        while place < size and found * _HOLLOW < size:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, start, os.SEEK_HOLE)
            found += place - start
    except (AttributeError, OSError) as error:
        if not isinstance(error, OSError) or error.errno != 6:  # ENXIO: no data from here on
            return size
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return found
