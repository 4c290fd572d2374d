"""Tensors are read to where they stay, aligned as torch aligns its own."""

import json

import pytest
import safetensors.torch
import torch

from tests.toys import ToyUNet, seeded
from tfmq_fx import ArtifactError, fold_timesteps, load, save
from tfmq_fx.serialization.artifact_tensors import _NAMED, read_tensors


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path):
    path = tmp_path / "file"
    numbers = torch.arange(-6, 7)  # of odd length, so that later ones start anywhere
    tensors = {str(dtype): numbers.abs().to(dtype) for dtype in _NAMED.values()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "rows": torch.ones(3, 5)}
    safetensors.torch.save_file(tensors, path)
    found, expected = read_tensors(path), safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].float(), value.float())
        assert found[name].data_ptr() % 64 == 0


def test_a_dtype_that_is_not_read_is_refused_by_name(tmp_path):
    header = json.dumps({"odd": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ArtifactError, match=r"odd is of U16"):
        read_tensors(tmp_path / "file")


def test_a_model_is_loaded_to_a_device(tmp_path):
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1])
    exact = fold_timesteps(seeded(ToyUNet).eval(), 3, (x, t))
    save(exact, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", device="cpu")(x, t), exact(x, t))
    away = load(tmp_path / "model", device="meta")
    assert {tensor.device.type for tensor in away.tensors()} == {"meta"}
    assert {spec.device for spec in away.call.inputs} == {"meta"}
    devices = [a for n in away.gm.graph.nodes for a in n.kwargs.values()]
    assert torch.device("cpu") not in [a for a in devices if isinstance(a, torch.device)]
