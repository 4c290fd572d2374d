"""Notices that the model a graph was made from has other weights or behaves otherwise since."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .behaviour import Behaviour, Pose, differences, explained
from .errors import StaleError
from .fingerprints import Fingerprint, bits
from .outside import Outside
from .sources import UnfusedAdapter, place_of, shown, tensor_at

_RUN = 8  # neighbouring elements of a tensor that every check reads
_data_ptr: Any = Tensor.data_ptr


class SourceWatch:
    """Watches the model that a graph was made from, without keeping it alive.

    fingerprints: of each tensor, by name; of them, parameters and buffers are watched.  held: the
    graph's own, which are trusted to be the source's where they lie in the same memory.
    behaviour: of its modules when it was captured.  outside: what it reads besides.

    A check reads where each tensor lies, how often it was written to and, on the CPU, 8 elements of
    it (which alone tell of `p.data += delta`): 0.3 us a tensor, 2 where no cache holds any of it.
    Where anything moved, tensors are compared with their fingerprints, all elements of them; a move
    to another device or dtype is no change.  Memory of tensors that moved away is released by the
    check that notices, or with the source.  Settings of modules are read as they are at every
    check; what a function or hook does, where they are others than before.
    """

    def __init__(
        self,
        source: nn.Module,
        fingerprints: Mapping[str, Fingerprint],
        held: Mapping[str, Tensor],
        behaviour: Behaviour | None = None,
        outside: Outside | None = None,
    ) -> None:
        self.outside = outside or Outside({})
        self._kind = type(source).__name__
        self._behaviour, self._pose = behaviour or {}, list[Pose]()
        seen = self._seen = list[Sighting]()  # the last one that was fine
        self._source = weakref.ref(source, lambda _: seen.clear())
        plain = {
            f"{path}.{leaf}".removeprefix(".")
            for path, module in source.named_modules(remove_duplicate=False)
            for leaf, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        self._fingerprints = {n: f for n, f in fingerprints.items() if n not in plain}
        found = {name: _at(source, name) for name in self._fingerprints}
        if all(_in_same_memory(value, held[name]) for name, value in found.items()):
            seen.append(Sighting(source, found))

    def __deepcopy__(self, memo: dict[int, Any]) -> SourceWatch:
        return self  # there is one source, and what was seen of it is true for all

    def watches(self, source: nn.Module) -> bool:
        """Whether `source` is what is watched, or nothing is left to watch."""
        return self._source() in (source, None)

    def check(self) -> None:
        """Raise StaleError where the source holds other weights; one that is gone holds none."""
        self.outside.check(contents=False)
        source = self._source()
        if source is None:
            return
        last = self._seen[0] if self._seen else None
        posed = bool(self._pose) and self._pose[0].stands(source)
        if last is None or not (posed and last.stands(source)):
            self._look(source, last)

    def check_contents(self) -> None:
        """`check`, with every element of every tensor read, and everything of the modules."""
        self.outside.check(contents=True)
        if (source := self._source()) is not None:
            self._look(source, None)

    def release(self, gm: nn.Module) -> None:
        """Give `gm` tensors of its own where it shares the source's memory.

        Raises StaleError where that memory holds other weights already.
        """
        source = self._source()
        if source is None:
            return
        changed = set(self._compare(source, None)[1])
        memory: dict[int, str] = {}
        for name in self._fingerprints:
            value = _at(source, name)
            if value is not None and value.numel() and not value.is_meta:
                memory[value.untyped_storage().data_ptr()] = name
        shared = [
            (owner, leaf, memory[value.untyped_storage().data_ptr()])
            for owner in gm.modules()
            for leaf, value in [*owner._parameters.items(), *owner._buffers.items()]
            if value is not None and value.untyped_storage().data_ptr() in memory
        ]
        if lost := sorted({name for *_, name in shared if name in changed}):
            raise StaleError(
                f"too late to keep the weights of before: {shown(lost)} of the {self._kind} that "
                "this model was made from changed in place, and this model shares their memory. "
                "Make it anew with tfmq_fx.refresh(model, source)."
            )
        for owner, leaf, _ in shared:
            if (parameter := owner._parameters.get(leaf)) is not None:
                parameter.data = parameter.data.clone()
            elif (buffer := owner._buffers[leaf]) is not None:
                owner._buffers[leaf] = buffer.clone()  # the source's own is the same object

    def _look(self, source: nn.Module, last: Sighting | None) -> None:
        """Compare what moved since `last`, or everything; note where all of it is now."""
        found, changed = self._compare(source, last)
        different = differences(self._behaviour, source)
        if changed:
            note = ""
            try:
                tensor_at(source, changed[0])
            except UnfusedAdapter as error:
                note = f" ({error})"
            if different:
                note += f", and behaves otherwise: {explained(different)}"
            remedy = "Make the model anew with tfmq_fx.refresh(model, source)"
            if different:
                remedy = "Prepare and convert it anew"
            raise StaleError(
                f"the {self._kind} that this model was made from has other weights since: "
                f"{shown(changed)}{note}. {remedy}, "
                "or call model.forget_source() to go on with the weights of before."
            )
        if different:
            raise StaleError(
                f"the {self._kind} that this model was made from behaves otherwise since: "
                f"{explained(different)}. Prepare and convert it anew, set it back, or call "
                "model.forget_source() to go on with what it was."
            )
        self._seen[:] = [Sighting(source, found)]
        self._pose[:] = [Pose(self._behaviour, source)]

    def _compare(
        self, source: nn.Module, last: Sighting | None
    ) -> tuple[dict[str, Tensor | None], list[str]]:
        """The source's tensors by name, and the names of those that changed."""
        found = {name: _at(source, name) for name in self._fingerprints}

        def same(name: str, value: Tensor | None) -> bool:
            if value is None:
                return False
            unmoved = last is not None and last.holds(name, value)
            return unmoved or self._fingerprints[name].matches(value)

        changed = [name for name, value in found.items() if not same(name, value)]
        return found, changed


class Sighting:
    """Where the tensors of a model lie, and a few elements of each."""

    def __init__(self, source: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
        links: list[tuple[int, str]] = []  # the position of a module's parent, and its name
        self._links = links  # the function below must not hold this object, which holds memory
        self._leaves: tuple[list[tuple[int, str]], ...] = ([], [])  # parameters, buffers
        positions = {"": 0}
        names: tuple[list[str], list[str]] = ([], [])

        def position(path: str) -> int:
            if path not in positions:
                parent, _, name = path.rpartition(".")
                links.append((position(parent), name))
                positions[path] = len(positions)
            return positions[path]

        for name in tensors:
            path, _, leaf = str(place_of(source, name)).rpartition(".")
            kind = 0 if leaf in source.get_submodule(path)._parameters else 1
            self._leaves[kind].append((position(path), leaf))
            names[kind].append(name)
        self._names = {name: i for i, name in enumerate(names[0] + names[1])}
        values = self._read(source)
        self._pointers, self._versions = [*map(_data_ptr, values)], [*map(_version, values)]
        self._runs = [_run(value) for value in values]
        self._parts = [bytes(run) for run in self._runs]
        self._content = b"".join(self._parts)

    def stands(self, source: nn.Module) -> bool:
        """Whether everything lies where it lay and reads as it read."""
        try:
            values = self._read(source)
            pointers = [*map(_data_ptr, values)]
        except (AttributeError, KeyError, RuntimeError, TypeError):  # a part was replaced
            return False
        try:
            versions = [value._version for value in values]
        except RuntimeError:  # tensors of inference mode count none
            versions = [*map(_version, values)]
        return (
            pointers == self._pointers
            and versions == self._versions
            and b"".join(self._runs) == self._content
        )

    def holds(self, name: str, value: Tensor) -> bool:
        """Whether one tensor lies where it lay and reads as it read."""
        i = self._names[name]
        still = (value.data_ptr(), _version(value)) == (self._pointers[i], self._versions[i])
        return still and bytes(self._runs[i]) == self._parts[i]

    def _read(self, source: nn.Module) -> list[Tensor]:
        modules: list[Any] = [source]
        for parent, name in self._links:
            modules.append(modules[parent]._modules[name])
        values = [modules[at]._parameters[leaf] for at, leaf in self._leaves[0]]
        return values + [modules[at]._buffers[leaf] for at, leaf in self._leaves[1]]


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _run(value: Tensor) -> Any:
    """Neighbouring elements in the middle of a tensor's memory: a view, empty off the CPU.

    As numpy, whose memory one join reads for 20 ns a tensor; torch takes 100 to 500.
    """
    room = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
    if value.device.type != "cpu" or not room:
        return b""
    start = max(0, min(value.numel() // 2, room - _RUN))
    place = value.storage_offset() + start
    return bits(torch.as_strided(value.detach(), (min(_RUN, room),), (1,), place)).numpy()


def _at(source: nn.Module, name: str) -> Tensor | None:
    try:
        return tensor_at(source, name)
    except UnfusedAdapter:  # what the layer computes is no longer what its weights say
        return None


def _in_same_memory(value: Tensor | None, other: Tensor) -> bool:
    if value is None or value.data_ptr() != other.data_ptr():
        return False
    return (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride())
