"""spill: values come back as they went, no more than the limit stays in memory, files go."""

import pytest
import torch

from tfmq_fx.calibration.activation_store import ActivationStore


def there_and_back(value, limit=0):
    with ActivationStore(limit) as spill:
        return spill.unpack(spill.pack(value))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64],
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 2)])
def test_tensors_of_any_dtype_come_back(dtype, shape):
    x = (torch.randn(shape) * 3).to(dtype)
    found = there_and_back(x)
    assert found.dtype == dtype and found.shape == x.shape and torch.equal(found, x)
    assert found.data_ptr() % 64 == 0


def test_strides_and_places_in_the_storage_are_kept():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)[:, 1:]
    found = there_and_back(x)
    assert torch.equal(found, x)
    assert (found.stride(), found.storage_offset()) == (x.stride(), x.storage_offset())


def test_what_holds_tensors_and_what_is_none():
    x = torch.randn(3)
    value = ({"a": [x, 3, None], "b": "text"}, torch.max(torch.ones(2, 2), dim=1))
    first, second = there_and_back(value)
    assert first["a"][1:] == [3, None] and first["b"] == "text"
    assert torch.equal(first["a"][0], x) and first["a"][0] is not x
    assert torch.equal(second.values, torch.ones(2)) and type(second) is type(value[1])


def test_views_come_back_as_views_of_what_they_were():
    x = torch.arange(100.0)
    views = (x[3:70], x[10:20], x.expand(1000, 100), x.view(10, 10).T, torch.complex(x, x).conj())
    for view in views:
        found = there_and_back(view)
        assert torch.equal(found, view) and found.stride() == view.stride()
        assert found.data_ptr() % 64 == view.data_ptr() % 64
        assert found.untyped_storage().nbytes() == view.untyped_storage().nbytes()


def test_the_limit_holds_for_views_of_one_storage_too():
    x = torch.zeros(100)
    with ActivationStore(1000) as spill:
        packed = [spill.pack(view) for view in x.split(25)]  # each keeps all of the storage
        assert spill.used == 800 and spill.written == 800
        for each in packed:
            spill.drop(each)
        assert spill.used == 0


def test_the_limit_holds_and_room_comes_back():
    with ActivationStore(1000) as spill:
        packed = [spill.pack(torch.full((100,), float(i))) for i in range(4)]
        assert spill.used == 800 and spill.written == 800
        assert [float(spill.unpack(p)[0]) for p in packed] == [0, 1, 2, 3]
        for p in packed[:2]:
            spill.drop(p)
        assert spill.used == 0
        spill.pack(torch.zeros(100))
        assert spill.used == 400 and spill.written == 800


def test_weights_are_no_copies():
    weight = torch.randn(4, 4)
    pinned = {weight.untyped_storage().data_ptr()}
    with ActivationStore(0) as spill:
        packed = spill.pack(weight.T, pinned)
        assert spill.written == 0 and spill.unpack(packed).data_ptr() == weight.data_ptr()


def test_files_go_whatever_happens(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ActivationStore(0) as spill:
        packed = spill.pack(torch.zeros(10))
        (directory,) = tmp_path.iterdir()
        assert len(list(directory.iterdir())) == 1
        spill.drop(packed)
        assert not list(directory.iterdir())
        spill.pack(torch.zeros(10))
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), ActivationStore(0) as spill:
        spill.pack(torch.zeros(10))
        raise KeyError
    assert not list(tmp_path.iterdir())
    with ActivationStore() as spill:  # no limit: no files
        x = torch.zeros(10)
        assert spill.pack(x) is x and not list(tmp_path.iterdir())
