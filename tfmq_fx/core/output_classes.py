"""The classes of results that a saved model may name, and how one is found without running more
than the library that defines it.

A saved model is data from somewhere else. What it may name are the output classes of diffusers and
transformers, by rule, and those that the caller of `load` hands over.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import ArtifactError

# Modules of a library that may hold output classes, and the base of all of these.
_LIBRARIES = {
    "diffusers": (
        re.compile(
            r"diffusers\.(models(\.[a-z]\w*)+|pipelines(\.[a-z]\w*)*\.modeling_\w+)", re.ASCII
        ),
        ("diffusers.utils.outputs", "BaseOutput"),
    ),
    "transformers": (
        re.compile(r"transformers\.(modeling_outputs|models\.[a-z]\w*\.modeling_\w+)", re.ASCII),
        ("transformers.utils.generic", "ModelOutput"),
    ),
}
_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)


def class_name(cls: type) -> str:
    """The name under which a class is saved."""
    return f"{cls.__module__}:{cls.__qualname__}"


def output_class(name: str, fields: Collection[str], given: Collection[type] = ()) -> type:
    """The class of that name, which takes exactly these fields.

    given: classes from the caller, which may be named as well.  Raises ArtifactError.
    """
    found = next((cls for cls in given if class_name(cls) == name), None)
    if found is None:
        found = _library_class(name)
    takes, needs = _fields(found)
    if not needs <= set(fields) <= takes:
        raise ArtifactError(
            f"the output type {name} takes the fields {sorted(takes)}, not {sorted(fields)}"
        )
    return found


def _library_class(name: str) -> type:
    module, _, qualname = name.partition(":")
    rule, base = _LIBRARIES.get(module.partition(".")[0], (None, None))
    if rule is None or base is None or not rule.fullmatch(module) or not _NAME.fullmatch(qualname):
        raise ArtifactError(
            f"the output type {name!r:.200} is none of diffusers' or transformers'; if it is "
            "yours, give it by hand: load(path, outputs=[YourClass])"
        )
    root = _imported(base[0], name)
    found = vars(_imported(module, name)).get(qualname)
    if not isinstance(found, type) or not issubclass(found, getattr(root, base[1])):
        raise ArtifactError(f"{name} is not an output type")
    if found.__module__ != module or not dataclasses.is_dataclass(found):
        raise ArtifactError(f"{name} is not an output type")
    return found


def _imported(module: str, name: str) -> Any:
    if module not in sys.modules:
        _check_installed(module.partition(".")[0], name)
    try:
        return importlib.import_module(module)
    except Exception as error:  # libraries raise what they like where something is missing
        raise ArtifactError(f"the output type {name} cannot be imported: {error}") from error


def _check_installed(package: str, name: str) -> None:
    """Raise ArtifactError where importing `package` would not run the installed library: a folder
    of that name in the working directory comes first in many an interpreter."""
    if package in sys.modules:
        return
    try:
        files = importlib.metadata.distribution(package)
        expected = Path(str(files.locate_file(f"{package}/__init__.py"))).resolve()
        spec = importlib.util.find_spec(package)
    except (importlib.metadata.PackageNotFoundError, ImportError, ValueError) as error:
        raise ArtifactError(f"the output type {name} needs {package}, not installed") from error
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != expected:
        raise ArtifactError(
            f"the output type {name} is of {package}, which is not imported, and the first "
            f"{package} on the path is not the installed one; import {package} before load()"
        )


def _fields(cls: type) -> tuple[set[str], set[str]]:
    """The fields that a dataclass or named tuple takes, and those that it cannot do without."""
    if dataclasses.is_dataclass(cls):
        taken = [f for f in dataclasses.fields(cls) if f.init]
        default = dataclasses.MISSING
        lacking = [f for f in taken if f.default is default and f.default_factory is default]
        return {f.name for f in taken}, {f.name for f in lacking}
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        names = set(cls._fields)
        return names, names - set(getattr(cls, "_field_defaults", {}))
    raise ArtifactError(f"{class_name(cls)} is no dataclass and no named tuple")
