"""Find the output classes that a saved model names, without running code of anyone else.

A saved model is untrusted data. It may name the output classes of diffusers and transformers, by
rule, and classes that the caller of `load` passes in.
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

# For each library: modules that may hold output classes, and the base class of these.
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


def output_class(name: str, fields: Collection[str], extra: Collection[type] = ()) -> type:
    """The output class called `name`, provided that it takes exactly `fields`.

    extra: further classes, from the caller.  Raises ArtifactError.
    """
    cls = next((each for each in extra if class_name(each) == name), None) or _library_class(name)
    takes, needs = _fields(cls)
    if not needs <= set(fields) <= takes:
        raise ArtifactError(
            f"the output type {name} takes the fields {sorted(takes)}, not {sorted(fields)}"
        )
    return cls


def _library_class(name: str) -> type:
    """The output class of diffusers or transformers called `name`."""
    module, _, qualname = name.partition(":")
    rule, base = _LIBRARIES.get(module.partition(".")[0], (None, None))
    if rule is None or base is None or not rule.fullmatch(module) or not _NAME.fullmatch(qualname):
        raise ArtifactError(
            f"the output type {name!r:.200} is none of diffusers' or transformers'; if it is "
            "yours, give it by hand: load(path, outputs=[YourClass])"
        )
    root = _imported(base[0], name)
    cls = vars(_imported(module, name)).get(qualname)
    if (
        not isinstance(cls, type)
        or not issubclass(cls, getattr(root, base[1]))
        or cls.__module__ != module
        or not hasattr(cls, "__dataclass_fields__")
    ):
        raise ArtifactError(f"{name} is not an output type")
    return cls


def _imported(module: str, name: str) -> Any:
    """Import a module of an installed library, for the output class `name`."""
    if module not in sys.modules:
        _check_installed(module.partition(".")[0], name)
    try:
        return importlib.import_module(module)
    except Exception as error:  # libraries raise what they like where something is missing
        raise ArtifactError(f"the output type {name} cannot be imported: {error}") from error


def _check_installed(package: str, name: str) -> None:
    """Raise ArtifactError unless importing `package` would run the installed library.

    A folder of that name in the working directory often comes first on the import path.
    """
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
    """All fields of a dataclass or named tuple, and the required ones."""
    if dataclasses.is_dataclass(cls):
        fields = [f for f in dataclasses.fields(cls) if f.init]
        none = dataclasses.MISSING
        required = {f.name for f in fields if f.default is none and f.default_factory is none}
        return {f.name for f in fields}, required
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        names = set(cls._fields)
        return names, names - set(getattr(cls, "_field_defaults", {}))
    raise ArtifactError(f"{class_name(cls)} is no dataclass and no named tuple")
