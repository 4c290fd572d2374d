"""record_inputs: what a pipeline gives its denoiser, and nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import tfmq_fx
from tests.tiny_pipelines import PIPELINES
from tfmq_fx import ConfigError, record_inputs


def called(pipe: Any, name: str, **options: Any) -> dict[str, Any]:
    """The first call of a component, seen by a hook on the component itself."""
    seen: list[dict[str, Any]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**kwargs, "positional": args}
        seen.append(tree_map(lambda value: value, given))  # a UNet takes elements out of lists

    hook = getattr(pipe, name).register_forward_pre_hook(look, with_kwargs=True)
    try:
        pipe(**options, generator=torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    return seen[0]


def tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


DENOISERS = {
    name: "unet"
    if name.startswith(("sd1", "sd2", "sd_", "sdxl", "ddpm", "ddim", "ldm", "svd", "kand", "anim"))
    else "transformer"
    for name in PIPELINES
}


@pytest.mark.parametrize("family", PIPELINES)
def test_inputs_are_those_of_the_first_call(family: str) -> None:
    pipe, options = PIPELINES[family]()
    name = DENOISERS[family]
    own = copy.deepcopy(options)
    found = record_inputs(
        pipe, component=name, generator=torch.Generator().manual_seed(0), **options
    )
    seen = called(pipe, name, **own)
    positional = seen.pop("positional")
    expected = tensors([*positional, *seen.values()])
    actual = [*found.values()][: len(positional)] + [found[name] for name in seen]
    assert len(tensors(found)) == len(expected)
    assert all(map(torch.equal, tensors(actual), expected))
    with torch.no_grad():  # they are what forward takes, by name
        getattr(pipe, name)(**found)


@pytest.mark.parametrize(
    "family, inputs",
    [
        ("sd_controlnet", {"down_block_additional_residuals", "mid_block_additional_residual"}),
        ("sd_t2i_adapter", {"down_intrablock_additional_residuals"}),
        ("sd_ip_adapter", {"added_cond_kwargs"}),
        ("sdxl", {"added_cond_kwargs"}),
    ],
)
def test_what_pipelines_add_is_among_them(family: str, inputs: set[str]) -> None:
    pipe, options = PIPELINES[family]()
    found = record_inputs(pipe, **options)
    assert inputs <= {name for name, value in found.items() if value is not None}
    assert found["sample"].shape[0] == 2  # for guidance


def test_a_mask_has_channels_of_its_own() -> None:
    pipe, options = PIPELINES["sd_inpainting"]()
    assert record_inputs(pipe, **options)["sample"].shape == (2, 9, 8, 8)


def test_nothing_of_the_pipeline_changes() -> None:
    pipe, options = PIPELINES["sd_image_to_image"]()
    before, unet = dict(vars(pipe)), dict(vars(pipe.unet))
    hooks = dict(pipe.unet._forward_pre_hooks)
    scheduler = copy.deepcopy(vars(pipe.scheduler))
    generator = torch.Generator().manual_seed(5)
    states = torch.get_rng_state(), generator.get_state()
    record_inputs(pipe, generator=generator, **options)
    assert vars(pipe) == before and vars(pipe.unet) == unet
    assert pipe.unet._forward_pre_hooks == hooks
    assert str(vars(pipe.scheduler)) == str(scheduler)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])


def test_no_step_is_made() -> None:
    pipe, options = PIPELINES["ddim"]()
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    record_inputs(pipe, **options | {"num_inference_steps": 1000})
    assert not calls


def test_models_compiled_by_torch_are_looked_into() -> None:
    pipe, options = PIPELINES["ddim"]()
    expected = record_inputs(pipe, **options)
    pipe.unet = torch.compile(pipe.unet)
    assert record_inputs(pipe, **options).keys() == expected.keys()


def test_of_several_denoisers_one_is_named() -> None:
    pipe, options = PIPELINES["wan22"]()
    with pytest.raises(ConfigError, match=r"component=<one of transformer, transformer_2>"):
        record_inputs(pipe, **options)
    early, late = (
        record_inputs(pipe, component=name, **options) for name in ("transformer", "transformer_2")
    )
    assert float(early["timestep"][0]) > float(late["timestep"][0])
    with pytest.raises(ConfigError, match=r"component='vae' is no denoiser of this WanPipeline"):
        record_inputs(pipe, component="vae", **options)
    with pytest.raises(ConfigError, match=r"did not call its transformer_2 in this call: .* steps"):
        record_inputs(pipe, component="transformer_2", **options | {"num_inference_steps": 1})


def test_errors_tell_what_to_pass() -> None:
    pipe, options = PIPELINES["sd15"]()
    with pytest.raises(ConfigError, match=r"cannot be called with these arguments \(ValueError"):
        record_inputs(pipe)
    with pytest.raises(ConfigError, match=r"a diffusers pipeline is needed, got UNet2DCondition"):
        record_inputs(pipe.unet, **options)
    exact, _ = PIPELINES["ddim"]()
    exact.unet = tfmq_fx.fold_timesteps(exact.unet, [0, 500])
    with pytest.raises(ConfigError, match=r"pipe.unet is a Converted of tfmq_fx already"):
        record_inputs(exact, batch_size=1)
