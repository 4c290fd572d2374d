"""Answer for what a captured model has besides its graph: attributes, parts and methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from tfmq_fx.core.errors import ArtifactError, FrozenError
from tfmq_fx.serialization.json_values import decode, encode, keys, typed

from .frozen_copy import frozen_copy, grafted, is_same, original_class


class SourceOutline:
    """The source of a graph without its weights, which does not keep the source alive.

    It answers what diffusers' pipelines ask a denoiser for: plain attributes as they were at
    capture, the structure of parts, and methods, which run on a copy that refuses every change: a
    method that only computes works, one that would change what capture froze raises FrozenError.
    A loaded model has the plain attributes alone.

    kind: the name of the source's class.  attributes: those that a saved model keeps.
    """

    def __init__(self, kind: str, attributes: Mapping[str, Any], copied: Any = None) -> None:
        self.kind, self.attributes = kind, dict(attributes)
        self._copy = copied

    @classmethod
    def of(cls, source: nn.Module) -> Self:
        """Return the outline of `source` as it is now."""
        attributes = {}
        for name, value in vars(source).items():
            if name.startswith("_") or name == "training":
                continue
            try:
                attributes[name] = decode(encode(value, name), name)
            except (ArtifactError, RecursionError):  # no plain data, or too deep for a file
                continue
        return cls(type(source).__name__, attributes, frozen_copy(source))

    def __deepcopy__(self, memo: dict[int, Any]) -> SourceOutline:
        return self  # nothing of it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceOutline, (self.kind, self.attributes)

    def moved(self, move: Callable[[Tensor], Tensor]) -> SourceOutline:
        """Return the outline with its tensors moved or cast as those of the model."""
        copied = None if self._copy is None else frozen_copy(self._copy, move)
        return SourceOutline(self.kind, self.attributes, copied)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data for `from_json`."""
        attributes = {name: encode(value, name) for name, value in self.attributes.items()}
        return {"class": self.kind, "attributes": attributes}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Self:
        """Return the outline that `to_json` wrote. Raises ArtifactError."""
        typed(keys(data, where, "class attributes"), where, attributes=dict, **{"class": str})
        named = {k: decode(v, f"{where}.attributes.{k}") for k, v in data["attributes"].items()}
        return cls(data["class"], named)

    def get(self, name: str) -> Any:
        """Return the attribute, part or method `name` of the source.

        Raises FrozenError, an AttributeError, for a weight and for what a loaded model lacks, and
        AttributeError where the source has none of this name.
        """
        if self._copy is None:
            if name in self.attributes:
                return self.attributes[name]
            raise FrozenError(
                f"no attribute {name!r}: a saved model has the graph of the {self.kind} that it "
                f"was made from, and plain attributes ({', '.join(self.attributes) or 'none'}). "
                f"Ask a {self.kind} itself, and change one before it is captured."
            )
        if name == _OFFLOAD:
            raise FrozenError(
                f"{name}() moves the weights of a {self.kind}, and this model has its own: call "
                "diffusers.hooks.apply_group_offloading(model, ...), as pipelines do"
            )
        static = inspect.getattr_static(self._copy, name, None)
        if isinstance(static, (classmethod, staticmethod)):
            return getattr(original_class(self._copy), name)
        config = vars(self._copy).get("_internal_dict")
        if static is None and isinstance(config, Mapping) and name in config:
            return config[name]  # as diffusers answers, with a warning
        value = getattr(self._copy, name)
        if inspect.ismethod(value):
            return self._forwarded(name, value)
        self._check(value, f"{name!r}")
        return value

    def part(self, name: str, held: nn.Module) -> nn.Module:
        """Return the part `name` of the source, with the layers of the graph in it.

        held: their container in the graph, which is returned where the part is not known.
        """
        if self._copy is None or self._copy._modules.get(name) is None:
            return held
        return grafted(self._copy._modules[name], held)  # type: ignore[no-any-return]

    def check_set(self, name: str, value: Any) -> None:
        """Raise FrozenError where setting an attribute would have changed the source, which the
        graph does not follow."""
        if self._copy is not None:
            if hasattr(self._copy, name):
                setattr(self._copy, name, value)  # raises, unless it has this value
        elif not is_same(self.attributes.get(name, value), value):
            raise FrozenError(
                f"{name!r} is an attribute that the {self.kind} had when it was captured, and the "
                "graph does not follow a change. Set it on the source and capture that again."
            )

    def _forwarded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the source that runs on the copy."""

        @functools.wraps(method)
        def forwarded(*args: Any, **kwargs: Any) -> Any:
            what = f"{name}() of the captured {self.kind}"
            try:
                result = method(*args, **kwargs)
            except FrozenError as error:
                raise FrozenError(f"{what} cannot be called here. {error}") from error
            except (RuntimeError, NotImplementedError) as error:
                if "meta" not in str(error):
                    raise
                raise FrozenError(f"{what} {_NEEDS_WEIGHTS} ({error}).") from error
            self._check(result, what)
            return result

        return forwarded

    @staticmethod
    def _check(value: Any, what: str) -> None:
        """Raise FrozenError where a value holds a weight, of which only the shape is known."""
        if _has_meta(value):
            raise FrozenError(f"{what} {_NEEDS_WEIGHTS}.")


def _has_meta(value: Any) -> bool:
    """Whether a tensor in `value` has a shape alone."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        return any(map(_has_meta, value))
    return isinstance(value, Tensor) and value.is_meta


# Absent, so that pipelines offload the graph's own layers: they ask hasattr() first.
_OFFLOAD = "enable_group_offload"
_NEEDS_WEIGHTS = (
    "needs weights, which the captured graph holds in forms of its own. Keep the source and ask it "
    "(its own class computes this from its own weights)"
)
