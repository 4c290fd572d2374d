"""Many processes that do one piece of work: who takes what, and what all of them know afterwards.

They are those of torch.distributed's default group (`torchrun`, `init_process_group`). Without a
group, or within `alone`, there is one process, and nothing here does anything. Whatever is
exchanged goes through `exchange`, `gather_to_first` and `all_reduce_sum`, which look first whether
all processes
have come to the same place: where one of them failed, the others raise its error instead of waiting
for it.
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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

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


def shard_indices(count: int) -> range:
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


def shard(items: Iterable[T], done: Callable[[], None] = nothing) -> Iterator[T]:
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
    """All `count` items, in their order, of which this process holds `shard_indices`."""
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
    found = _meet(what, packed=pack(value))
    return [value if i == rank() else unpack(each) for i, each in enumerate(found)]


def gather_to_first(value: T, what: str) -> list[T]:
    """The values of all processes in the first one, nothing in the others; as `exchange`."""
    if world() == 1:
        return [value]
    packed = b"" if rank() == 0 else pack(value)
    _meet(what)
    found: list[Any] | None = [b""] * world() if rank() == 0 else None
    dist.gather_object(packed, found, dst=0)
    return [] if found is None else [value, *map(unpack, found[1:])]


def from_first(value: T, what: str) -> T:
    """The value of the first process, in all of them; what the others give counts for nothing."""
    if world() == 1:
        return value
    found = [pack(value) if rank() == 0 else b""]
    _meet(what)
    dist.broadcast_object_list(found, src=0)
    made: T = value if rank() == 0 else unpack(found[0])
    return made


def all_reduce_sum(value: Tensor, what: str) -> Tensor:
    """The sum of all processes' tensors, the same bits in each of them; `value` is overwritten."""
    if world() == 1:
        return value
    _meet(what)
    on_cpu = "cpu:" in dist.get_backend_config()
    wire = value.to("cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(wire)
    return value.copy_(wire)


def check_same(what: str, facts: Mapping[str, Any]) -> None:
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
            _meet(what, error)
        raise
    exchange(None, f"the end of {what}")


def _meet(what: str, own: Exception | None = None, packed: bytes = b"") -> list[bytes]:
    """What all processes, at the place `what` and without an error, have packed.

    Raises, in every process, the error of the first that has one, else ConfigError.
    """
    given: list[Any] = [None] * world()
    dist.all_gather_object(given, (what, _portable(own), packed))
    places, errors, found = zip(*given, strict=True)
    for place, error in enumerate(errors):
        if error is not None and place == rank():
            assert own is not None
            raise _known(own)
        if error is not None:
            error.add_note(f"raised in process {place} of {world()}")
            raise _known(error) from own
    if len(set(places)) > 1:
        shown = ", ".join(f"process {i} is at {where}" for i, where in enumerate(places))
        raise _known(ConfigError(f"the processes were not called alike: {shown}"))
    return list(found)


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


# ---------------------------------------------------------------------------- values on the way


class _Pickler(pickle.Pickler):
    """Has tensors pickled by their elements alone, not by all of their memory and its device."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_quantized:
            return NotImplemented
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        plain = torch.view_as_real(plain) if plain.is_complex() else plain
        content = bytearray(plain.flatten().view(torch.uint8).numpy())
        stride = torch.empty_like(value, device="meta").stride()
        return _tensor, (content, value.dtype, value.shape, stride, value.device.type)


def _tensor(
    content: bytearray, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], device: str
) -> Tensor:
    """The tensor whose elements have these bytes, in memory of its own."""
    found = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if content:
        found.copy_(torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape))
    return found


def pack(value: Any) -> bytes:
    """Anything that can be pickled, as bytes for another process of this program."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def unpack(packed: bytes) -> Any:
    """The value that was packed: tensors with the same bits and strides, on a device of the same
    kind. Runs what the bytes say, which other processes of this program wrote."""
    return pickle.loads(packed)
