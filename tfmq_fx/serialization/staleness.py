"""Notices that the model a graph was made from has other weights or behaves otherwise since."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tfmq_fx.capture.outside_tensors import memory_state
from tfmq_fx.core.errors import StaleError

from .fingerprints import Fingerprint
from .module_settings import Behaviour, differences, explained, is_simple, settings
from .outside_watch import Outside
from .source_tensors import UnfusedAdapter, is_wrapped, place_of, shown, tensor_at

_NOTHING: Behaviour = {}
_FUSED = ("merged", "merged_adapters", "disable_adapters", "scaling")  # of an adapter of peft's


class StalenessCheck:
    """Watches the model that a graph was made from, without keeping it or its memory alive.

    fingerprints: of each tensor, by name; of them, parameters and buffers are watched.  held: the
    graph's own, which are trusted to be the source's where they lie in the same memory.
    behaviour: of its modules when it was captured.  outside: what it reads besides.

    A check reads where each tensor lies, how often it was written to, and the settings of modules:
    not what a write past the version counter (`p.data += delta`) did, which `check_contents` reads.
    Tensors that moved are compared with their fingerprints, all elements of them, and so are all
    tensors where modules stand otherwise (an adapter was fused); a move to another device or dtype
    is no change.  What a function or hook does is read where it is another than before.
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
        self._behaviour = behaviour or _NOTHING
        self._seen: TensorSnapshot | None = None  # the last one that was fine, modules included
        self._source = weakref.ref(source)
        plain = {
            f"{path}.{leaf}".removeprefix(".")
            for path, module in source.named_modules(remove_duplicate=False)
            for leaf, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        self._fingerprints = {n: f for n, f in fingerprints.items() if n not in plain}
        found = {name: _at(source, name) for name in self._fingerprints}
        shared = all(_in_same_memory(value, held[name]) for name, value in found.items())
        if shared and not differences(self._behaviour, source):
            self._seen = TensorSnapshot(source, found, self._behaviour)

    def __deepcopy__(self, memo: dict[int, Any]) -> StalenessCheck:
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
        stands, moved = self._seen.compared(source) if self._seen else (False, [])
        if not stands or moved:
            self._look(source, moved if stands else self._fingerprints)

    def check_contents(self) -> None:
        """`check`, with every element of every tensor read, and everything of the modules."""
        self.outside.check(contents=True)
        if (source := self._source()) is not None:
            self._look(source, self._fingerprints)

    def release(self, gm: nn.Module) -> None:
        """Give `gm` tensors of its own where it shares the source's memory.

        Raises StaleError where that memory holds other weights already.
        """
        source = self._source()
        if source is None:
            return
        changed = set(self._changed(source, self._fingerprints))
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

    def _look(self, source: nn.Module, names: Collection[str]) -> None:
        """Compare the tensors of these names, and the modules; note where all of it is now."""
        changed = self._changed(source, names)
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
        self._seen = TensorSnapshot(source, self._fingerprints, self._behaviour)

    def _changed(self, source: nn.Module, names: Collection[str]) -> list[str]:
        """Those of `names` whose tensors are gone or hold something else."""

        def same(name: str) -> bool:
            value = _at(source, name)
            return value is not None and self._fingerprints[name].matches(value)

        return [name for name in names if not same(name)]


class TensorSnapshot:
    """Where tensors of a model lie, and how recorded modules stand: for a quick look, without
    holding a module, a tensor, or its memory.

    Raises ConfigError where an adapter is in the way of a tensor.
    """

    def __init__(
        self, source: nn.Module, tensors: Iterable[str], recorded: Behaviour = _NOTHING
    ) -> None:
        self._names = [*tensors]
        self._links = links = list[tuple[int, str]]()  # the position of a module's parent, its name
        positions = {"": 0}

        def position(path: str) -> int:
            if path not in positions:
                parent, _, name = path.rpartition(".")
                links.append((position(parent), name))
                positions[path] = len(positions)
            return positions[path]

        self._leaves = list[tuple[int, str]]()
        for name in self._names:
            path, _, leaf = str(place_of(source, name)).rpartition(".")
            self._leaves.append((position(path), leaf))
        found = [(position(path), names) for path, names in settings(recorded, source)]
        self._posed = bool(found)
        modules = self._modules(source)
        self._wrapping = [i for i, module in enumerate(modules) if is_wrapped(module)]
        slots = [(i, name) for i, names in found for name in names]
        simple = [is_simple(vars(modules[i]).get(name)) for i, name in slots]
        self._plain = [slot for slot, plain in zip(slots, simple, strict=True) if plain]
        self._objects = [slot for slot, plain in zip(slots, simple, strict=True) if not plain]
        self._pose = copy.deepcopy(self._pose_of(modules))
        values = self._values(modules)
        # a storage that is gone gives up its memory, and no other one gets its name meanwhile
        self._alive = [StorageWeakRef(value.untyped_storage()) for value in values]
        self._places = [*map(memory_state, values)]

    def compared(self, source: nn.Module) -> tuple[bool, list[str]]:
        """Whether modules stand as they stood, and which tensors moved or were written to."""
        try:
            modules = self._modules(source)
            stands = self._pose_of(modules) == self._pose
            places = [*map(memory_state, self._values(modules))]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False, self._names  # a part was replaced
        if places == self._places:
            return stands, []
        pairs = zip(self._names, places, self._places, strict=True)
        return stands, [name for name, now, was in pairs if now != was]

    def _modules(self, source: nn.Module) -> list[Any]:
        modules: list[Any] = [source]
        for parent, name in self._links:
            modules.append(modules[parent]._modules[name])
        return modules

    def _values(self, modules: list[Any]) -> list[Tensor]:
        return [
            held[leaf] if leaf in (held := modules[at]._parameters) else modules[at]._buffers[leaf]
            for at, leaf in self._leaves
        ]

    def _pose_of(self, modules: list[Any]) -> tuple[list[Any], ...]:
        """Settings, and the identity of whatever else may change what modules compute."""
        wrapping = [modules[i] for i in self._wrapping]
        fused = [getattr(module, name, None) for module in wrapping for name in _FUSED]
        if not self._posed:
            return (fused,)
        states = [module.__dict__ for module in modules]
        return (
            [states[i].get(name) for i, name in self._plain],
            [id(states[i].get(name)) for i, name in self._objects],
            [*map(type, modules)],
            [id(state.get("forward")) for state in states],
            [(*state["_forward_pre_hooks"], *state["_forward_hooks"]) for state in states],
            fused,
        )


def _at(source: nn.Module, name: str) -> Tensor | None:
    try:
        return tensor_at(source, name)
    except UnfusedAdapter:  # what the layer computes is no longer what its weights say
        return None


def _in_same_memory(value: Tensor | None, other: Tensor) -> bool:
    if value is None or value.data_ptr() != other.data_ptr():
        return False
    return (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride())
