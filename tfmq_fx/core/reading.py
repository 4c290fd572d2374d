"""Read and parse untrusted files safely: no hanging, no unbounded work.

The cost of refusing a file is bounded by its size: its type is checked before it is opened, its
nesting and its numbers before or while it is parsed.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import stat
from collections import Counter
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
    """Open the regular file at `path` for reading; links are followed.

    Raises ArtifactError where it is a pipe, a device or a directory, where it is mostly holes, or
    where it has more than `limit` bytes, and OSError where it cannot be opened.
    """
    _check_regular(path, os.stat(path).st_mode)  # opening a device may already do something
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    file: BufferedReader = os.fdopen(descriptor, "rb")
    try:
        info = os.fstat(file.fileno())
        _check_regular(path, info.st_mode)
        if limit is not None and info.st_size > limit:
            raise ArtifactError(f"{path} has {info.st_size} bytes, and at most {limit} are read")
        if info.st_size > 1 << 24 and _data_bytes(file.fileno()) * _HOLLOW < info.st_size:
            raise ArtifactError(f"{path} claims {info.st_size} bytes, but nearly all are holes")
    except BaseException:
        file.close()
        raise
    return file


def read_json(path: Path, limit: int = JSON_BYTES, *, nan: bool = False) -> Any:
    """Read the JSON value in the file at `path`.

    Raises ArtifactError, naming the file, and OSError where it cannot be opened.
    """
    with open_regular(path, limit) as file:
        return parse_json(file.read(), str(path), nan=nan)


def parse_json(content: bytes | str, where: str, *, nan: bool = False) -> Any:
    """Parse a JSON text as Python's own `json` writes it, in UTF-8.

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
        value = dict(pairs)
        if len(value) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ArtifactError(f"{where}: the key {twice!r:.80} is given twice")
        return value

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
    """Raise ArtifactError for a JSON text nested deeper than 128 levels."""
    brackets = _STRING.sub(b"", data).translate(None, _OTHERS)
    deepest: Iterable[int] = itertools.accumulate(map(_BRACKETS.__getitem__, brackets))
    if max(deepest, default=0) > DEPTH:
        raise ArtifactError(f"{where} is nested deeper than {DEPTH} levels")


def _check_regular(path: Path, mode: int) -> None:
    """Raise ArtifactError unless `mode` is that of a regular file."""
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
        raise ArtifactError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, no file")


def _data_bytes(descriptor: int) -> int:
    """The bytes of a file that are not holes (at least enough to decide), or its size where the
    system does not know."""
    size, place, data = os.fstat(descriptor).st_size, 0, 0
    try:
        while place < size and data * _HOLLOW < size:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, start, os.SEEK_HOLE)
            data += place - start
    except AttributeError:
        return size
    except OSError as error:
        if error.errno != errno.ENXIO:  # else: no data from here on
            return size
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return data
