"""call_batches: a call for all samples becomes calls for some of them."""

import pytest
import torch

from tfmq_fx.calibration.call_batches import call_batches
from tfmq_fx.core.errors import ConfigError


def test_prompts_are_divided_and_all_else_is_repeated():
    prompts, negative = ["a", "b", "c"], ["x", "y", "z"]
    calls = call_batches((prompts, 512), {"negative_prompt": negative, "eta": 0.5}, 2)
    assert calls == [
        ((["a", "b"], 512), {"negative_prompt": ["x", "y"], "eta": 0.5}),
        ((["c"], 512), {"negative_prompt": ["z"], "eta": 0.5}),
    ]


def test_embeddings_and_labels_have_rows_too():
    embeds = torch.arange(6.0).reshape(3, 2)
    (_, first), (_, second) = call_batches((), {"prompt_embeds": embeds, "sigmas": [1.0, 0.5]}, 2)
    assert torch.equal(first["prompt_embeds"], embeds[:2]) and first["sigmas"] == [1.0, 0.5]
    assert torch.equal(second["prompt_embeds"], embeds[2:])
    calls = call_batches((), {"class_labels": [4, 5, 6]}, 1)
    assert [named["class_labels"] for _, named in calls] == [[4], [5], [6]]


@pytest.mark.parametrize(
    "args, kwargs", [(("a",), {}), ((), {"prompt": "a", "image": [1, 2, 3]}), ((["a", "b"],), {})]
)
def test_a_call_of_few_samples_stays(args, kwargs):
    assert call_batches(args, kwargs, 2) == [(args, kwargs)]


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"prompt": ["a", "b", "c"], "image": [1, 2, 3]}, "image"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "negative_prompt"),
        ({"prompt": ["a", "b", "c"], "latents": torch.zeros(3, 4)}, "latents"),
    ],
)
def test_rows_that_belong_to_nobody_are_refused(kwargs, name):
    with pytest.raises(ConfigError, match=f"the rows of {name} are for; leave batch_size out"):
        call_batches((), kwargs, 2)
