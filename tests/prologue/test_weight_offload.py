"""Offloaded weights read as ever, are written as ever, and leave memory."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.prologue.bound.toys import captured, check, conditional, draw
from tfmq_fx import Bound, ConfigError, PrologueSpec, bind_request, load, save
from tfmq_fx.prologue.weight_offload import Offloaded, check_offload


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with torch.no_grad():
        return tmp_path


def draw_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64],
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 2), (2, 3, 4, 5)])
def test_values_are_the_same_wherever_they_are(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = draw_tensor(*shape, dtype=dtype)
    tensor.view(-1)[:1] = float("nan") if dtype.is_floating_point else 0
    before, strides = bytes_of(tensor), tensor.stride()
    moved = Offloaded({"a": tensor}, "disk")
    for _ in range(2):
        assert moved.away() and not moved.away() and moved.is_away
        assert bytes_of(tensor) == before and (tensor.dtype, tensor.shape) == (dtype, shape)
        moved.back()
        moved.back()
        assert bytes_of(tensor) == before and not moved.is_away
    moved.away()
    moved.restore()
    assert bytes_of(tensor) == before and tensor.stride() == strides and not moved.is_away


@pytest.mark.parametrize(
    "make",
    [
        lambda: draw_tensor(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: draw_tensor(4, 6).t(),
        lambda: draw_tensor(4, 6)[1:, ::2],
        lambda: draw_tensor(1, 6).expand(4, 6),
        lambda: draw_tensor(8, 1, 1, 1).to(memory_format=torch.channels_last),
    ],
    ids=["channels_last", "transposed", "gaps", "expanded", "one"],
)
def test_layouts(make: Callable[[], Tensor]) -> None:
    """Kept where there are no gaps: kernels round by the layout."""
    tensor = make()
    before, strides = tensor.clone(), tensor.stride()
    dense = before.stride() == strides
    moved = Offloaded({"a": tensor}, "disk")
    for step in (moved.away, moved.back, moved.away, moved.restore):
        step()
        assert torch.equal(tensor, before)
        assert not dense or tensor.stride() == strides


WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda w: w.add_(1),
    "data": lambda w: w.data.mul_(2),
    "new data": lambda w: setattr(w, "data", w + 1),
    "item": lambda w: w.__setitem__((3, 1), 9.0),
    "numpy": lambda w: w.numpy().__iadd__(1),
}


@pytest.mark.parametrize("when", ["away", "back"])
@pytest.mark.parametrize("how", WRITES)
def test_writes_are_not_lost(how: str, when: str) -> None:
    tensor, other = draw_tensor(1000, 8), draw_tensor(50)
    expected, rest = tensor.clone(), other.clone()
    moved = Offloaded({"a": tensor, "b": other}, "disk")
    for _ in range(3):
        moved.away()
        if when == "back":
            moved.back()
        WRITES[how](tensor)
        WRITES[how](expected)
        assert torch.equal(tensor, expected)
        moved.back()
        moved.away()
        assert torch.equal(tensor, expected) and torch.equal(other, rest)
    moved.restore()
    assert torch.equal(tensor, expected)


def test_memory_that_others_hold_is_theirs() -> None:
    """What shares the memory of a weight is not written to, nor what a reader has in hand."""
    tensor = draw_tensor(100)
    view = tensor.detach()[:10]
    moved = Offloaded({"a": tensor}, "disk")
    moved.away()
    in_hand = tensor.detach()[:10]
    before = view.clone()
    tensor.add_(1)
    moved.back()
    moved.away()
    assert torch.equal(view, before) and torch.equal(tensor[:10], before + 1)
    assert torch.equal(in_hand, before + 1)
    tensor.add_(1)
    assert torch.equal(in_hand, before + 1) and torch.equal(view, before)


def test_parameters_stay_themselves() -> None:
    layer = nn.Linear(4, 4)
    weight = layer.weight
    moved = Offloaded({"weight": weight}, "disk")
    moved.away()
    assert layer.weight is weight and weight.requires_grad and weight.is_leaf
    layer(torch.ones(1, 4)).sum().backward()
    assert weight.grad is not None
    moved.restore()
    assert layer.weight is weight


def test_files_go_with_the_model(folder: Path) -> None:
    tensor = draw_tensor(100)
    moved = Offloaded({"a": tensor}, "disk")
    assert not list(folder.iterdir())  # nothing is made before it is needed
    moved.away()
    (made,) = folder.iterdir()
    assert sum(f.stat().st_size for f in made.iterdir()) == tensor.nbytes == moved.nbytes()
    assert made.stat().st_mode & 0o077 == 0  # nobody else's to read
    expected = tensor.clone()
    del moved
    gc.collect()
    assert not made.exists() and torch.equal(tensor, expected)  # pages outlive the name


def test_what_cannot_be_moved() -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    with pytest.raises(ConfigError, match=r"on the CPU already\. Use offload='disk'"):
        check_offload("cpu", cpu)
    with pytest.raises(ConfigError, match=r"this one is on meta\. Use offload='cpu'"):
        check_offload("disk", other)
    for kind, device in (("none", cpu), ("none", other), ("disk", cpu), ("cpu", other)):
        check_offload(kind, device)
    still = Offloaded({"a": draw_tensor(3)}, "none")
    assert not still.away() and not still.is_away
    assert Offloaded({}, "disk").nbytes() == 0


@torch.no_grad()
def test_a_model_that_has_moved_since_is_not_offloaded() -> None:
    """One made for another device runs where it is loaded."""
    model, source = captured()
    with pytest.raises(ConfigError, match="on the CPU already"):
        bind_request(source, offload="cpu")
    found = Bound(source, PrologueSpec(offload="cpu"))
    check(found, draw(), model)
    summary = found.prologue.summary()
    assert summary["offload"] == "none" and not found.prologue.offloaded.is_away
    assert found.spec.offload == "cpu"


def test_tensors_in_one_memory_count_once() -> None:
    tensor = draw_tensor(100)
    assert Offloaded({"a": tensor, "b": tensor}, "none").nbytes() == tensor.nbytes


# ---------------------------------------------------------------- in a bound model


@torch.no_grad()
def test_a_bound_model_goes_on(folder: Path) -> None:
    model = conditional()
    expected = {f"gm.{key}": value.clone() for key, value in model.state_dict().items()}
    found = bind_request(model, [9, 5], example_inputs=draw(), offload="disk")
    whole, freed = found.nbytes(), found.prologue.offloaded.nbytes()
    assert found.prologue.offloaded.is_away  # from the start: nothing needs them yet
    for seed in (0, 1, 0):
        for step in (9, 5, 3):
            check(found, draw(seed=seed, t=step), model)
            assert found.prologue.offloaded.is_away
            assert found.resident_bytes() == whole - freed + found.prologue.nbytes()
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert all(torch.isfinite(p).all() for p in found.parameters())
    save(found, folder / "saved")
    check(load(folder / "saved"), draw(), model)
    plain = found.unbound()
    assert not found.prologue.offloaded.is_away and plain.nbytes() == whole
    check(plain, draw(), model)
    check(found, draw(), model)
    temporary = [path for path in folder.iterdir() if path.name.startswith("tfmq_fx-offload-")]
    assert len(temporary) == 1
    del found
    gc.collect()
    assert not temporary[0].exists()
    check(plain, draw(), model)


@torch.no_grad()
def test_steps_as_they_come_do_not_move_weights_to_and_fro() -> None:
    found = bind_request(copy.deepcopy(captured()[1]), offload="disk")
    moves = []
    away = found.prologue.offloaded.away
    found.prologue.offloaded.away = lambda: moves.append(1) or away()  # type: ignore[method-assign]
    for step in (9, 5, 3):
        check(found, draw(t=step))
    assert not moves and not found.prologue.offloaded.is_away
    check(found, draw(t=3))  # nothing new: they may go
    assert len(moves) == 1 and found.prologue.offloaded.is_away
    for step in (9, 5, 3):  # of another prompt, all at once
        check(found, draw(seed=1, t=step))
    assert found.prologue.offloaded.is_away


@torch.no_grad()
def test_a_step_never_touches_what_is_away() -> None:
    found = bind_request(copy.deepcopy(captured()[1]), [9, 5], offload="disk")
    found(**draw(t=9))
    for tensor in found.prologue.offloaded.tensors.values():
        tensor.data = torch.full_like(tensor, float("nan"))
    found.prologue._snapshot = found.prologue._take_snapshot()  # as if nobody had noticed
    assert torch.isfinite(found(**draw(t=5))).all()


class Large(nn.Module):
    """56 MiB of weights for the condition, 64 B for the sample."""

    def __init__(self, wide: int = 1 << 15) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, wide), nn.Linear(wide, 440)
        self.end, self.out = nn.Linear(440, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        wide = torch.tanh(self.up(c + t[:, None]))
        return self.out(x) * self.end(torch.tanh(self.down(wide)))


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.no_grad()
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured on Linux")
def test_memory_is_given_back() -> None:
    """And again after the second and third request, which need the weights for a while."""
    values = {"x": torch.ones(2, 4), "t": torch.tensor([1, 1]), "c": torch.ones(2, 4)}

    def used(offload: Any, **sizes: int) -> list[float]:
        gc.collect()
        before, found = resident(), []
        model = bind_request(Large(**sizes), [1, 2], example_inputs=values, offload=offload)
        assert sizes or model.prologue.offloaded.nbytes() > 55 * 2**20
        for _ in range(3):
            values["c"] = values["c"] + 1
            for step in (1, 2):
                model(**values | {"t": torch.tensor([step, step])})
            found.append(resident() - before)
        return found

    used("disk", wide=64)  # what is loaded and kept at the first use of anything
    assert all(mib > 55 for mib in used("none"))
    # pages that were read since, and what the allocator keeps
    assert all(mib < 15 for mib in used("disk"))
