"""Pipelines calibrate at the timesteps that they visit: another start, another schedule, given."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch

from tests.toys import seeded
from tfmq_fx import calibrate, convert, prepare

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TEXT = {name: torch.randn(1, 7, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
IMAGE = torch.rand(1, 3, 8, 8)


@functools.cache
def parts() -> dict[str, Any]:
    unet = seeded(
        diffusers.UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    vae = seeded(
        diffusers.AutoencoderKL,
        block_out_channels=[4],
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
    )
    none = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return {"unet": unet.eval(), "vae": vae.eval(), **dict.fromkeys(none)}


def pipeline(kind: str, scheduler: Any) -> Any:
    made = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    return made(**parts(), scheduler=scheduler, requires_safety_checker=False)


@functools.cache
def prepared(kind: torch.dtype) -> Any:
    example = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(1, dtype=kind),
        "encoder_hidden_states": torch.randn(2, 7, 8),
    }
    return prepare(parts()["unet"], example, config="w8a8-dynamic")


def visited(model: Any, pipe: Any, steps: int, **options: Any) -> list[float]:
    """The timesteps that calibration by `pipe` visits."""
    before = Counter(model.cache.visits)
    calibrate(
        model, pipe, num_inference_steps=steps, progress=False, output_type="latent",
        **TEXT, **options,
    )  # fmt: skip
    return sorted(Counter(model.cache.visits) - before)


CASES = {
    "pndm": ("", diffusers.PNDMScheduler(skip_prk_steps=True), {}, [1, 251, 501, 751]),
    "karras": (
        "",
        diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
        {},
        [0, 301, 775, 999],
    ),
    "euler": ("", diffusers.EulerDiscreteScheduler(), {}, [0.0, 333.0, 666.0, 999.0]),
    "heun": ("", diffusers.HeunDiscreteScheduler(), {}, [0.0, 333.0, 666.0, 999.0]),
    "lcm": ("", diffusers.LCMScheduler(), {}, [259, 499, 759, 999]),
    "given": ("", diffusers.DDPMScheduler(), {"timesteps": [900, 500, 100]}, [100, 500, 900]),
    "given to lcm": ("", diffusers.LCMScheduler(), {"timesteps": [999, 499]}, [499, 999]),
    "from an image": (
        "Img2Img",
        diffusers.DDIMScheduler(),
        {"image": IMAGE, "strength": 0.5},
        [1, 251],
    ),
    "from an image, euler": (
        "Img2Img",
        diffusers.EulerDiscreteScheduler(),
        {"image": IMAGE, "strength": 0.5},
        [0.0, 333.0],
    ),
    "from an image, lcm": (
        "Img2Img",
        diffusers.LCMScheduler(),
        {"image": IMAGE, "strength": 0.5},
        [259, 499],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_calibrates_at_the_steps_that_it_takes(name: str) -> None:
    kind, scheduler, options, expected = CASES[name]
    floats = any(isinstance(step, float) for step in expected)
    model = prepared(torch.float32 if floats else torch.int64)
    assert visited(model, pipeline(kind, scheduler), 4, **options) == expected


def test_a_model_calibrated_in_the_middle_serves_the_whole_way() -> None:
    """Its ranges end where calibration began; beyond, those of the end are taken."""
    model = prepared(torch.int64)
    half = pipeline("Img2Img", diffusers.DDIMScheduler())
    visited(model, half, 4, image=IMAGE, strength=0.5)
    done = convert(model, progress=False)
    assert done.timesteps is not None
    pipe = pipeline("", diffusers.DDIMScheduler())
    pipe.unet = done
    image = pipe(num_inference_steps=7, output_type="latent", **TEXT).images
    assert torch.isfinite(image).all() and done.unvisited.met
