"""Many processes that do one piece of work: who takes what, and what all of them know afterwards.

They are those of torch.distributed's default group (`torchrun`, `init_process_group`). Without a
group, or within `alone`, there is one process, and nothing here does anything. Whatever is
exchanged goes through `exchange`, `collect` and `summed`, which look first whether all processes
have come to the same place: where one of them failed, the others raise its error instead of waiting
for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError
from .parcels import pack, unpack

T = TypeVar("T")
R = TypeVar("R")

_PIECE = 1 << 30  # bytes sent at once
_alone = ContextVar("alone", default=False)


# ---------------------------------------------------------------------------- who there is


def world() -> int:
    """How many processes work together."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if world() == 1 else dist.get_rank()


def mine(count: int) -> range:
    """Which of `count` items this process takes: every `world()`-th."""
    return range(rank(), count, world())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this process works as if there were no others, who need not be there."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextlib.contextmanager
def started() -> Iterator[None]:
    """A group as `torchrun` describes it in the environment, where it does and there is none yet;
    over nccl where there is a CUDA device for each process, else over gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda:
        torch.cuda.set_device(local)
    # they wait for each other at the end of long work, of which one may have hours more
    backend, patience = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(days=1)
    dist.init_process_group(backend, timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- work in turn


def nothing() -> None:
    """Does nothing."""


def dealt(items: Iterable[T], done: Callable[[], None] = nothing) -> Iterator[T]:
    """Those of `items` that this process takes, every `world()`-th.

    done: called by every process after each round, in which each takes one item at most, so that
    what was found is put together in the order of the items. Never where there is one process.
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
    """work(item) of each item, in their order, in every process; each is done by one of them."""
    if world() == 1:
        yield from map(work, items)
        return
    rest = iter(items)
    while turn := list(itertools.islice(rest, world())):
        for found in exchange([work(item) for item in turn[rank() : rank() + 1]], what):
            yield from found


def interleaved(own: Sequence[T], count: int, what: str) -> list[T]:
    """All `count` items, in their order, of which this process holds `mine`."""
    parts = exchange(own, what)
    return [parts[i % world()][i // world()] for i in range(count)]


# ---------------------------------------------------------------------------- exchange


def exchange(value: T, what: str) -> list[T]:
    """The values of all processes, in their order.

    value: anything that can be pickled; tensors keep their bits and strides, and their kind of
    device.  what: the place in the work; every process must be at the same one.
    Raises the error of a process that failed, and ConfigError where one is elsewhere.
    """
    if world() == 1:
        return [value]
    packed = pack(value, _wire())
    return _spread(value, packed, _meet(what, len(packed)))


def collect(value: T, what: str) -> list[T]:
    """The values of all processes in the first one, nothing in the others; as `exchange`."""
    if world() == 1:
        return [value]
    packed = pack(value, _wire())
    sizes = _meet(what, len(packed))
    if rank():
        for piece in packed.split(_PIECE):
            dist.send(piece, 0)
        return []
    found = [value]
    for source, size in enumerate(sizes[1:], 1):
        buffer = torch.empty(size, dtype=torch.uint8, device=_wire())
        for piece in buffer.split(_PIECE):
            dist.recv(piece, source)
        found.append(unpack(buffer))
    return found


def from_first(value: T, what: str) -> T:
    """The value of the first process, in all of them; what the others give counts for nothing."""
    return exchange(value if rank() == 0 else None, what)[0]  # type: ignore[return-value]


def summed(value: Tensor, what: str) -> Tensor:
    """The sum of all processes' tensors, the same bits in each of them; `value` is overwritten."""
    if world() == 1:
        return value
    _meet(what)
    wire = value.to(_wire())
    dist.all_reduce(wire)
    return value.copy_(wire)


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError in every process where one has other `facts` than the first, naming them.

    facts: plain values that can be compared, by name.
    """
    if world() == 1:
        return
    first, *others = exchange(_flat(facts), what)
    for place, other in enumerate(others, 1):
        named = [n for n in dict.fromkeys([*first, *other]) if first.get(n) != other.get(n)]
        if named:
            shown = "; ".join(f"{n}: {first.get(n)!r} and {other.get(n)!r}" for n in named[:5])
            raise _known(ConfigError(f"{what} differs between processes 0 and {place} ({shown})"))


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, (list, tuple)):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in _flat(value).items()}
        else:
            flat[str(name)] = value
    return flat


# ---------------------------------------------------------------------------- errors


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Work that all processes do: an error of one is raised by each of them, by the others where
    they exchange something next, or at the end. Where several fail it is that of the first."""
    if world() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, "_known_to_all", False):
            _gather([0, 1, 0])
            _fail(what, error)
        raise
    exchange(None, f"the end of {what}")


def _meet(what: str, size: int = 0) -> list[int]:
    """The sizes that the processes give. Raises where one failed or is not at the place `what`."""
    tags, failed, sizes = zip(*_gather([zlib.crc32(what.encode()), 0, size]), strict=True)
    if any(failed) or len(set(tags)) > 1:
        _fail(what, None)
    return list(sizes)


def _fail(what: str, own: Exception | None) -> NoReturn:
    """Raise, in every process, the error of the first that has one."""
    value = (what, _portable(own))
    packed = pack(value, _wire())
    found = _spread(value, packed, [size for _, _, size in _gather([0, 0, len(packed)])])
    for place, (_, error) in enumerate(found):
        if error is not None and place == rank():
            assert own is not None
            raise _known(own)
        if error is not None:
            error.add_note(f"raised in process {place} of {world()}")
            raise _known(error) from own
    places = ", ".join(f"process {i} is at {where}" for i, (where, _) in enumerate(found))
    raise _known(ConfigError(f"the processes were not called alike: {places}"))


def _known(error: Exception) -> Exception:
    """The error, marked as one that every process raises."""
    error._known_to_all = True  # type: ignore[attr-defined]
    return error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or where it cannot be pickled one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# ---------------------------------------------------------------------------- tensors on the way


def _wire() -> torch.device:
    """Where tensors must lie to be sent."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _gather(numbers: list[int]) -> list[list[int]]:
    """The numbers of each process."""
    own = torch.tensor(numbers, device=_wire())
    found = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(found, own)
    return [each.tolist() for each in found]


def _spread(value: T, packed: Tensor, sizes: Sequence[int]) -> list[T]:
    """The values of all processes; of this one `value`, which is `packed`."""
    found: list[T] = []
    for source, size in enumerate(sizes):
        own = source == rank()
        buffer = packed if own else torch.empty(size, dtype=torch.uint8, device=_wire())
        for piece in buffer.split(_PIECE) if size else ():
            dist.broadcast(piece, source)
        found.append(value if own else unpack(buffer))
    return found
