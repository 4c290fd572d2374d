"""Share work, results and errors among the processes of torch.distributed's default group.

Without a group (`torchrun`, `init_process_group`), or within `alone`, there is one process and
every function here returns at once. Every exchange first compares the places that the processes
have reached: where one of them failed, the others raise its error instead of waiting for it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

_alone = ContextVar("alone", default=False)


# ---------------------------------------------------------------------------- process group


def world() -> int:
    """The number of processes in the group."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """The index of this process in the group, from 0."""
    return 0 if world() == 1 else dist.get_rank()


def shard_indices(count: int) -> range:
    """The indices, out of `count`, that this process takes: every `world()`-th."""
    return range(rank(), count, world())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work without the other processes of the group inside a `with` block."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Join the group that `torchrun` describes in the environment, unless there is one already.

    The backend is nccl where each process has a CUDA device, else gloo. Without `torchrun` nothing
    happens.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda:
        torch.cuda.set_device(local)
    # processes wait for each other at the end of long work, where one may have hours more
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- division of work


def nothing() -> None:
    """Do nothing: the default `done` of `shard`."""


def shard(items: Iterable[T], done: Callable[[], None] = nothing) -> Iterator[T]:
    """The items that this process takes: every `world()`-th.

    done: called by every process after each round, in which each takes at most one item, so that
    results can be merged in the order of the items. Not called where there is one process.
    """
    count, place = world(), rank()
    if count == 1:
        yield from items
        return
    i = -1
    for i, item in enumerate(items):
        if i % count == place:
            yield item
        if i % count == count - 1:
            done()
    if i % count != count - 1:
        done()


def in_order(items: Iterable[T], work: Callable[[T], R], what: str) -> Iterator[R]:
    """The results work(item) in the order of the items; one process computes each, all get it."""
    if world() == 1:
        yield from map(work, items)
        return
    rest = iter(items)
    while turn := list(itertools.islice(rest, world())):
        for results in exchange([work(item) for item in turn[rank() : rank() + 1]], what):
            yield from results


def interleaved(own: Sequence[T], count: int, what: str) -> list[T]:
    """All `count` items in order, where each process holds those of its `shard_indices`."""
    parts = exchange(own, what)
    return [parts[i % world()][i // world()] for i in range(count)]


# ---------------------------------------------------------------------------- exchange


def exchange(value: T, what: str) -> list[T]:
    """The values of all processes, by rank.

    value: anything that can be pickled; tensors keep bits, strides and device type.
    what: the name of the place in the work, which must be the same in every process.
    Raises the error of a process that failed, and ConfigError where one is at another place.
    """
    if world() == 1:
        return [value]
    packed = _meet(what, packed=pack(value))
    return [value if i == rank() else unpack(each) for i, each in enumerate(packed)]


def gather_to_first(value: T, what: str) -> list[T]:
    """The values of all processes in the first one, an empty list in the others."""
    if world() == 1:
        return [value]
    packed = b"" if rank() == 0 else pack(value)
    _meet(what)
    gathered: list[Any] | None = [b""] * world() if rank() == 0 else None
    dist.gather_object(packed, gathered, dst=0)
    return [] if gathered is None else [value, *map(unpack, gathered[1:])]


def from_first(value: T, what: str) -> T:
    """The value of the first process in all of them; the others' values are ignored."""
    return exchange(value if rank() == 0 else cast(T, None), what)[0]


def all_reduce_sum(value: Tensor, what: str) -> Tensor:
    """The sum of all processes' tensors, with the same bits in each; overwrites `value`."""
    if world() == 1:
        return value
    _meet(what)
    on_cpu = "cpu:" in dist.get_backend_config()
    wire = value.to("cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(wire)
    return value.copy_(wire)


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError in every process, naming the difference, unless all have equal `facts`.

    facts: plain values that can be compared, by name.
    """
    if world() == 1:
        return
    first, *others = exchange(_flat(facts), what)
    for place, other in enumerate(others, 1):
        names = [n for n in dict.fromkeys([*first, *other]) if first.get(n) != other.get(n)]
        if names:
            shown = "; ".join(f"{n}: {first.get(n)!r} and {other.get(n)!r}" for n in names[:5])
            raise _known(ConfigError(f"{what} differs between processes 0 and {place} ({shown})"))


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings and sequences as one dict whose keys are dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, (list, tuple)):
            value = {str(i): v for i, v in enumerate(value)}
        inner = _flat(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return flat


# ---------------------------------------------------------------------------- errors


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Raise an error of one process inside a `with` block in all of them.

    The others raise it at their next exchange or at the end of the block. Where several processes
    fail, it is the error of the lowest rank.
    """
    if world() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, "_known_to_all", False):
            _meet(what, error)
        raise
    exchange(None, f"the end of {what}")


def _meet(what: str, own: Exception | None = None, packed: bytes = b"") -> list[bytes]:
    """The bytes `packed` of all processes, provided that all are at the place `what`.

    own: the error of this process. Every process raises the error of the lowest rank that has one,
    or ConfigError where the places differ.
    """
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, (what, _portable(own), packed))
    places, errors, contents = zip(*gathered, strict=True)
    for place, error in enumerate(errors):
        if error is not None and place == rank():
            assert own is not None
            raise _known(own)
        if error is not None:
            error.add_note(f"raised in process {place} of {world()}")
            raise _known(error) from own
    if len(set(places)) > 1:
        shown = ", ".join(f"process {i} is at {where}" for i, where in enumerate(places))
        raise _known(
            ConfigError(f"processes called different functions or in a different order: {shown}")
        )
    return list(contents)


def _known(error: Exception) -> Exception:
    """Mark an error as one that every process raises."""
    error._known_to_all = True  # type: ignore[attr-defined]
    return error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or a RuntimeError of the same text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# ---------------------------------------------------------------------------- serialization


def pack(value: Any) -> bytes:
    """Serialize anything that can be pickled for another process of this program."""
    file = io.BytesIO()
    # cloned: saving a view would send all the memory that it shares
    torch.save(tree_map_only(Tensor, lambda x: x.detach().clone(), value), file)
    return file.getvalue()


def unpack(packed: bytes) -> Any:
    """Restore a value from `pack`: tensors with the same bits and strides, on a device of the same
    type. Unpickles without restrictions: the bytes must come from this program."""
    return torch.load(io.BytesIO(packed), map_location=_own_device, weights_only=False)


def _own_device(storage: Any, location: str) -> Any:
    """Move what was on another process's CUDA device to this one's."""
    return storage.cuda() if location.startswith("cuda") else storage
