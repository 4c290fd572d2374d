"""examples: what each kind of denoiser is given, and what cannot be derived."""

import types

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests import zoo
from tfmq_fx.capture.diffusers_inputs import example_inputs
from tfmq_fx.core.errors import ConfigError


def described(inputs):
    """Shapes in place of tensors."""
    return tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, inputs)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ddpm-cifar10", {"sample": (2, 3, 32, 32), "timestep": (2,)}),
        ("adm", {"sample": (2, 3, 64, 64), "timestep": (2,), "class_labels": (2,)}),
        (
            "sdxl",
            {
                "sample": (2, 4, 128, 128),
                "timestep": (2,),
                "encoder_hidden_states": (2, 77, 2048),
                "added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 6)},
            },
        ),
        (
            "controlnet-sd15",
            {
                "sample": (2, 4, 16, 16),
                "timestep": (2,),
                "encoder_hidden_states": (2, 77, 768),
                "controlnet_cond": (2, 3, 128, 128),
            },
        ),
        (
            "svd",
            {
                "sample": (2, 3, 8, 96, 96),
                "timestep": (2,),
                "encoder_hidden_states": (2, 1, 1024),
                "added_time_ids": (2, 3),
            },
        ),
        (
            "pixart-alpha-1024",
            {
                "hidden_states": (2, 4, 128, 128),
                "encoder_hidden_states": (2, 16, 4096),
                "timestep": (2,),
                "added_cond_kwargs": {"resolution": (2, 2), "aspect_ratio": (2, 1)},
                "encoder_attention_mask": (2, 16),
            },
        ),
        (
            "flux-dev",
            {
                "hidden_states": (2, 256, 64),
                "encoder_hidden_states": (2, 16, 4096),
                "pooled_projections": (2, 768),
                "timestep": (2,),
                "img_ids": (256, 3),
                "txt_ids": (16, 3),
                "guidance": (2,),
            },
        ),
        (
            "hunyuan-dit",
            {
                "hidden_states": (2, 4, 128, 128),
                "timestep": (2,),
                "encoder_hidden_states": (2, 77, 1024),
                "text_embedding_mask": (2, 77),
                "encoder_hidden_states_t5": (2, 256, 2048),
                "text_embedding_mask_t5": (2, 256),
                "image_meta_size": (2, 6),
                "style": (2,),
                "image_rotary_emb": ((4096, 88), (4096, 88)),
            },
        ),
        (
            "wan-1.3b",
            {
                "hidden_states": (2, 16, 3, 16, 16),
                "timestep": (2,),
                "encoder_hidden_states": (2, 16, 4096),
            },
        ),
        (
            "cogvideox-2b",
            {
                "hidden_states": (2, 13, 16, 60, 90),
                "encoder_hidden_states": (2, 226, 4096),
                "timestep": (2,),
            },
        ),
        (
            "qwen-image",
            {
                "hidden_states": (2, 256, 64),
                "encoder_hidden_states": (2, 16, 3584),
                "encoder_hidden_states_mask": (2, 16),
                "timestep": (2,),
                "img_shapes": [[(1, 16, 16)]] * 2,
            },
        ),
        ("z-image", {"x": [(16, 1, 16, 16)] * 2, "t": (2,), "cap_feats": [(16, 2560)] * 2}),
    ],
)
def test_published_configurations(name, expected):
    inputs = example_inputs(zoo.model(name, full=True, device="meta"))
    assert described(inputs) == expected
    assert all(leaf.is_meta for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("sd15", torch.int64),
        ("wan-1.3b", torch.int64),
        ("flux-dev", torch.bfloat16),
        ("sd3", torch.float32),
        ("z-image", torch.float32),
    ],
)
def test_timesteps_are_what_schedulers_give(name, dtype):
    inputs = example_inputs(zoo.model(name, dtype=torch.bfloat16))
    assert inputs.get("timestep", inputs.get("t")).dtype == dtype


def test_values():
    model = zoo.model("hunyuan-video", dtype=torch.bfloat16)
    inputs = example_inputs(model, batch=3)
    assert inputs["hidden_states"].dtype == torch.bfloat16 and len(inputs["hidden_states"]) == 3
    assert inputs["guidance"].tolist() == [3.5] * 3
    assert inputs["encoder_attention_mask"].tolist() == [[1] * 12 + [0] * 4] * 3
    again = example_inputs(model, batch=3)
    assert all(map(torch.equal, tree_leaves(inputs), tree_leaves(again)))
    assert example_inputs(model, scale=2)["hidden_states"].shape == (2, 4, 3, 32, 32)


def test_random_state_is_left_alone():
    random = torch.get_rng_state()
    example_inputs(zoo.model("dit-xl-2"))
    assert torch.equal(random, torch.get_rng_state())


class Unheard(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = types.SimpleNamespace(**config)

    def forward(self, sample, timestep, mood, *more, weight=1.0, **rest):
        return sample


def test_what_cannot_be_derived_is_named():
    with pytest.raises(ConfigError, match=r"for Unheard: .* what 'mood' is. Pass example_inputs="):
        example_inputs(Unheard(in_channels=3, sample_size=8))
    with pytest.raises(ConfigError, match="what 'sample' and 'mood' are"):
        example_inputs(Unheard(in_channels=3))
