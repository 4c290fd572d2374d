"""Detect that a source model has other weights, or behaves differently, than at conversion."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tfmq_fx.capture.outside_tensors import memory_state
from tfmq_fx.core.errors import StaleError

from .fingerprints import Fingerprint, is_readable
from .module_settings import Behaviour, current_settings, differences, explained, is_simple
from .source_tensors import (
    UnfusedAdapter,
    changed_tensors,
    fused_tensor_at,
    is_wrapped,
    place_of,
    shown,
    tensor_at,
)

_FUSED = ("merged", "merged_adapters", "disable_adapters", "scaling")  # attributes of peft adapters


class OutsideTensors:
    """The tensors of closures and globals that a model's code reads, as they were at conversion.

    tensors: by name; the graph has copies of them.  Those that no longer exist cannot change.
    """

    def __init__(self, tensors: Mapping[str, weakref.ref[Tensor]]) -> None:
        self._seen: dict[str, tuple[weakref.ref[Tensor], Fingerprint, Any]] = {}
        for name, reference in tensors.items():
            value = reference()
            if value is not None and is_readable(value):
                self._seen[name] = (reference, Fingerprint.of(value), memory_state(value))

    def changed(self, *, contents: bool = True) -> list[str]:
        """Return the names of the tensors that hold other values now.

        contents: read all of them, not only those that were moved or written to.
        """
        names = []
        for name, (reference, fingerprint, place) in self._seen.items():
            value = reference()
            if value is None or (not contents and memory_state(value) == place):
                continue
            if not fingerprint.matches(value):
                names.append(name)
        return names

    def check(self, *, contents: bool) -> None:
        """Raise StaleError where a tensor changed; contents: as for `changed`."""
        if names := self.changed(contents=contents):
            raise StaleError(
                f"{', '.join(names)}: a tensor that the model's code reads from outside its "
                "modules (a closure, a global) has changed since. Prepare and convert it anew, or "
                "call model.forget_source() to go on with the values of before."
            )


class StalenessCheck:
    """Watches the source model of a graph, without keeping it or its memory alive.

    fingerprints: of each tensor, by name; parameters and buffers are watched.  behaviour: of the
    source's modules at capture.  outside: the tensors that it reads outside its modules.

    The first check compares everything. After that, `check` reads where each tensor lies, how often
    it was written to, and the settings of modules. It does not see a write past the version counter
    (`p.data += delta`); `check_contents` does. All elements of tensors that moved are compared with
    their fingerprints, and those of all tensors where the state of modules differs (an adapter was
    fused). A move to another device or dtype is no change. The code of a function or hook is
    compared if the object is another one.
    """

    def __init__(
        self,
        source: nn.Module,
        fingerprints: Mapping[str, Fingerprint],
        behaviour: Behaviour | None = None,
        outside: OutsideTensors | None = None,
    ) -> None:
        self.outside = outside or OutsideTensors({})
        self._kind = type(source).__name__
        self._behaviour = behaviour or {}
        self._snapshot: TensorSnapshot | None = None  # the last one that showed no change
        self._source = weakref.ref(source)
        plain = {
            f"{path}.{leaf}".removeprefix(".")
            for path, module in source.named_modules(remove_duplicate=False)
            for leaf, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        self._fingerprints = {n: f for n, f in fingerprints.items() if n not in plain}

    def __deepcopy__(self, memo: dict[int, Any]) -> StalenessCheck:
        return self  # there is one source, and one state of it, for all copies of a model

    @property
    def source(self) -> nn.Module | None:
        """The watched model; None where it no longer exists."""
        return self._source()

    @property
    def seen(self) -> object:
        """The state of the source when it was last found unchanged: another object after every
        move or write."""
        return self._snapshot

    def watches(self, source: nn.Module) -> bool:
        """Whether `source` is the watched model, or the watched model no longer exists."""
        return self._source() in (source, None)

    def check(self) -> None:
        """Raise StaleError where the source changed; one that no longer exists did not."""
        self.outside.check(contents=False)
        source = self._source()
        if source is None:
            return
        same_state, moved = self._snapshot.compare(source) if self._snapshot else (False, [])
        if not same_state:
            self._compare(source, self._fingerprints)
        elif moved:
            self._compare(source, {name: self._fingerprints[name] for name in moved})

    def check_contents(self) -> None:
        """Raise StaleError where the source changed, after reading every element of every tensor
        and everything of the modules."""
        self.outside.check(contents=True)
        if (source := self._source()) is not None:
            self._compare(source, self._fingerprints)

    def _compare(self, source: nn.Module, fingerprints: Mapping[str, Fingerprint]) -> None:
        """Compare these tensors and all modules, then take a new snapshot; raises StaleError."""
        changed = changed_tensors(source, fingerprints)
        different = explained(differences(self._behaviour, source))
        if changed:
            note = ""
            try:
                tensor_at(source, changed[0])
            except UnfusedAdapter as error:
                note = f" ({error})"
            remedy = "Make the model anew with tfmq_fx.refresh(model, source)"
            if different:
                note += f", and behaves otherwise: {different}"
                remedy = "Prepare and convert it anew"
            raise StaleError(
                f"the {self._kind} that this model was made from has other weights since: "
                f"{shown(changed)}{note}. {remedy}, "
                "or call model.forget_source() to go on with the weights of before."
            )
        if different:
            raise StaleError(
                f"the {self._kind} that this model was made from behaves otherwise since: "
                f"{different}. Prepare and convert it anew, set it back, or call "
                "model.forget_source() to go on with what it was."
            )
        self._snapshot = TensorSnapshot(source, self._fingerprints, self._behaviour)

    def release(self, gm: nn.Module) -> None:
        """Copy the tensors of `gm` that share the source's memory.

        Raises StaleError where that memory holds other weights already.
        """
        source = self._source()
        if source is None:
            return
        memory: dict[int, str] = {}
        for name in self._fingerprints:
            value = fused_tensor_at(source, name)
            if value is not None and value.numel() and not value.is_meta:
                memory[value.untyped_storage().data_ptr()] = name
        shared = [
            (owner, leaf, memory[value.untyped_storage().data_ptr()])
            for owner in gm.modules()
            for leaf, value in [*owner._parameters.items(), *owner._buffers.items()]
            if value is not None and value.untyped_storage().data_ptr() in memory
        ]
        names = {name: self._fingerprints[name] for name in sorted({name for *_, name in shared})}
        if lost := changed_tensors(source, names):
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


class TensorSnapshot:
    """The places of a model's tensors and the state of its modules, for a quick comparison.

    Keeps no module, tensor or memory alive.  recorded: behaviour of the modules to compare.

    Raises ConfigError where an adapter is in the way of a tensor.
    """

    def __init__(
        self, source: nn.Module, tensors: Iterable[str], recorded: Behaviour | None = None
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
        self._with_settings = bool(recorded)
        settings = [
            (position(path), names) for path, names in current_settings(recorded or {}, source)
        ]
        modules = self._modules(source)
        self._wrapping = [i for i, module in enumerate(modules) if is_wrapped(module)]
        self._plain, self._objects = list[tuple[int, str]](), list[tuple[int, str]]()
        for i, name in ((i, name) for i, names in settings for name in names):
            kind = self._plain if is_simple(vars(modules[i]).get(name)) else self._objects
            kind.append((i, name))
        self._state = copy.deepcopy(self._state_of(modules))
        values = self._values(modules)
        # a storage that is gone gives up its memory, and no other one gets its name meanwhile
        self._alive = [StorageWeakRef(value.untyped_storage()) for value in values]
        self._places = [*map(memory_state, values)]

    def compare(self, source: nn.Module) -> tuple[bool, list[str]]:
        """Return whether the modules' state is the same, and the names of the tensors that moved or
        were written to."""
        try:
            modules = self._modules(source)
            same_state = self._state_of(modules) == self._state
            places = [*map(memory_state, self._values(modules))]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False, self._names  # a part was replaced
        if places == self._places:
            return same_state, []
        pairs = zip(self._names, places, self._places, strict=True)
        return same_state, [name for name, now, was in pairs if now != was]

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

    def _state_of(self, modules: list[Any]) -> tuple[list[Any], ...]:
        """Return settings, and the identity of all else that may change what modules compute."""
        wrapping = [modules[i] for i in self._wrapping]
        fused = [getattr(module, name, None) for module in wrapping for name in _FUSED]
        if not self._with_settings:
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
