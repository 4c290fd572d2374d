"""skeletons: a config becomes a model without weights, or an error that says why not."""

import json
import sys

import pytest
import torch

from tests.toys import tiny_unet2d
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.diagnostics.meta_model import meta_model

CONFIG = {"_class_name": "UNet2DModel", **dict(tiny_unet2d().config)}


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_files_and_directories_are_built_without_weights(tmp_path):
    file = written(tmp_path / "pipe" / "unet" / "config.json", CONFIG)
    for path in (file, str(file), file.parent, file.parent.parent):
        model = meta_model(path)
        assert type(model).__name__ == "UNet2DModel" and not model.training
        assert all(p.device.type == "meta" for p in [*model.parameters(), *model.buffers()])
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in tiny_unet2d().named_parameters()
        }
    with torch.device("cpu"):
        assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not a JSON file that can be read"),
        ("[]", "is no config: it holds a list"),
        ({}, "has no _class_name"),
        ({"_class_name": 3}, "has no _class_name"),
        ({"_class_name": "UNet9D"}, r"diffusers .* has no class 'UNet9D'"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler is no model"),
        (
            {"_class_name": "UNet2DModel", "down_block_types": ["Nope"]},
            "UNet2DModel cannot be built: ValueError",
        ),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    file = written(tmp_path / "config.json", content)
    with pytest.raises(ConfigError, match=message) as caught:
        meta_model(file)
    assert str(file) in str(caught.value)


def test_directories_in_doubt_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file or directory"):
        meta_model(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"holds no config.json, and no unet, transformer"):
        meta_model(tmp_path)
    for name in ("unet", "prior"):
        written(tmp_path / name / "config.json", CONFIG)
    with pytest.raises(ConfigError, match=r"holds several denoisers; choose from .*unet, .*prior"):
        meta_model(tmp_path)


def test_diffusers_missing_is_said(tmp_path, monkeypatch):
    file = written(tmp_path / "config.json", CONFIG)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="install diffusers to build it"):
        meta_model(file)
