"""references: what a command line names is loaded offline, or told why not."""

import json

import pytest
import torch

from tests.toys import tiny_unet2d
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation import glyphs
from tfmq_fx.evaluation.digits import load_unet
from tfmq_fx.evaluation.glyphs import load_dit
from tfmq_fx.evaluation.load_reference import load_reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "unet"
    tiny_unet2d().save_pretrained(path)
    return path


def same(a, b):
    state = b.state_dict()
    return list(a.state_dict()) == list(state) and all(
        torch.equal(value, state[name]) for name, value in a.state_dict().items()
    )


def test_what_save_pretrained_wrote_comes_back(folder):
    model = load_reference(str(folder), torch.float32)
    assert type(model).__name__ == "UNet2DModel" and not model.training
    assert same(model, tiny_unet2d())
    half = load_reference(str(folder), torch.bfloat16)
    assert same(half, tiny_unet2d().to(torch.bfloat16))


@pytest.mark.parametrize(
    "name, load", [("digits", load_unet), ("glyphs", load_dit), ("glyphs-unet", glyphs.load_unet)]
)
def test_shipped_models_go_by_their_names(name, load):
    assert same(load_reference(name, torch.float32), load())


def test_what_cannot_be_loaded_is_told(folder, tmp_path):
    with pytest.raises(
        ConfigError, match="is neither digits nor glyphs nor glyphs-unet, nor a dir"
    ):
        load_reference(str(tmp_path / "nowhere"), torch.float32)
    with pytest.raises(ConfigError, match=r"nor a directory with the config\.json"):
        load_reference(str(folder / "config.json"), torch.float32)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ("{", "is not a JSON file that can be read"),
        ("[1]", "is no config: it holds a list"),
        (json.dumps({"in_channels": 3}), "has no _class_name"),
        (json.dumps({"_class_name": "Nonsense"}), "has no class 'Nonsense'"),
        (json.dumps({"_class_name": "DDIMScheduler"}), "DDIMScheduler is no model"),
        (json.dumps(config), "UNet2DModel cannot be loaded: OSError: .*no file named"),
    ):
        (tmp_path / "config.json").write_text(change)
        with pytest.raises(ConfigError, match=message):
            load_reference(str(tmp_path), torch.float32)
