"""Images from a seed each: their noise, what they are drawn of, and what pipelines give."""

from __future__ import annotations

import functools
import types
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.toys import seeded
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation.seeded_sampling import (
    DrawPlan,
    pipeline_sampler,
    plan_images,
    scheduler_sampler,
    to_tensor,
)

SHAPE = (3, 8, 8)


class Gain(nn.Module):
    """Answers with a multiple of what it sees: an image's rounding does not depend on its batch."""

    def __init__(self, size: int = SHAPE[1]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.config = types.SimpleNamespace(in_channels=3, sample_size=size)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.seen: list[Any] = []

    def forward(self, x: Tensor, t: Any) -> Any:
        self.seen.append(x.clone())
        return types.SimpleNamespace(sample=self.gain * x)


class Told(diffusers.DiffusionPipeline):
    """A pipeline that is told what to draw and notes it; its images are noise."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, prompt, num_inference_steps=2, generator=None, output_type="pil", **more):
        self.unet.seen.append((prompt, num_inference_steps, output_type, more))
        noise = [torch.randn(8, 8, 3, generator=each) for each in generator]
        return types.SimpleNamespace(images=torch.stack(noise).sigmoid().numpy())


def images(samples: int = 5, seed: int = 0, steps: int = 3, **arguments: Any) -> DrawPlan:
    return plan_images(arguments, samples=samples, seed=seed, steps=steps, shared=())


def in_batches(draw: Any, samples: int, size: int) -> Tensor:
    starts = range(0, samples, size)
    return torch.cat([draw(range(start, min(start + size, samples))) for start in starts])


# ---------------------------------------------------------------- noise


PIPELINES = {
    "ddpm": lambda: diffusers.DDPMPipeline(Gain(), diffusers.DDPMScheduler()),
    "ddim": lambda: diffusers.DDIMPipeline(Gain(), diffusers.DDIMScheduler()),
}
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)


@pytest.mark.parametrize("seed", [0, 1000])
@pytest.mark.parametrize("kind", [*PIPELINES, *SCHEDULERS])
def test_an_image_does_not_depend_on_its_batch(kind: str, seed: int) -> None:
    def make(first: int, samples: int) -> Any:
        wanted = images(samples, seed=first)
        if kind in PIPELINES:
            return pipeline_sampler(PIPELINES[kind](), wanted)
        return scheduler_sampler(Gain(), (getattr(diffusers, kind)(), SHAPE), wanted)

    whole = in_batches(make(seed, 5), 5, 5)
    assert whole.shape == (5, *SHAPE) and whole.dtype == torch.float32
    assert float(whole.std()) > 0.01 and bool((whole.abs() <= 1).all())
    for size in (1, 2, 4):
        assert torch.equal(in_batches(make(seed, 5), 5, size), whole)
    for i in (0, 3):
        assert torch.equal(make(seed + i, 1)(range(1))[0], whole[i])
    assert not torch.equal(whole[0], whole[1])
    again = make(seed, 5)
    assert torch.equal(again(range(5)), again(range(5)))


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_pipelines_start_from_the_noise_of_the_seed(kind: str) -> None:
    pipeline = PIPELINES[kind]()
    in_batches(pipeline_sampler(pipeline, images(3, seed=7, steps=2)), 3, 2)
    first, _, last, _ = pipeline.unet.seen  # two batches of two steps
    for i, row in enumerate([*first, *last]):
        expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7 + i))
        assert torch.equal(row, expected)


def test_a_pipeline_and_its_scheduler_draw_the_same() -> None:
    by_hand = scheduler_sampler(Gain(), (diffusers.DDPMScheduler(), SHAPE), images())
    drawn = pipeline_sampler(PIPELINES["ddpm"](), images())(range(5))
    # The pipeline halves, shifts and clamps; undoing that costs a rounding of 6e-8 or two.
    torch.testing.assert_close(drawn, by_hand(range(5)), rtol=0, atol=3e-7)


def test_noise_that_a_pipeline_takes_from_nowhere_is_the_images_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DiTPipeline names no generator to its scheduler, and doubles the batch for guidance."""
    monkeypatch.setitem(zoo.ENTRIES["dit-xl-2"].reduced, "num_embeds_ada_norm", 1000)
    vae = seeded(
        diffusers.AutoencoderKL, block_out_channels=(8,), norm_num_groups=4, latent_channels=4
    )
    pipeline = diffusers.DiTPipeline(
        zoo.model("dit-xl-2"), vae.eval(), diffusers.DDPMScheduler(), id2label=None
    )
    wanted = images(3, class_labels=[1, 207, 360])
    draw = pipeline_sampler(pipeline, wanted)
    whole = draw(range(3))
    # Float32 sums of other batch sizes are ordered otherwise: some 1e-6, where noise is 0.1.
    torch.testing.assert_close(in_batches(draw, 3, 1), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(in_batches(draw, 3, 2), whole, rtol=0, atol=1e-4)
    assert float((whole[0] - whole[1]).abs().max()) > 0.01


# ---------------------------------------------------------------- arguments


def test_rows_are_split_and_the_rest_is_shared() -> None:
    embeds, array = torch.randn(4, 2, 2), np.arange(4)
    wanted = images(
        4,
        class_labels=[7, 8, 9, 6],
        prompt_embeds=embeds,
        ages=array,
        prompt="a cat",
        negative_prompt_2="blurred",
        mode="fast",
        original_size=(4, 4, 4, 4),
        guidance_scale=2.0,
        offset=torch.tensor(1.0),
        timesteps=[9, 6, 3],
        options={"a": 1},
    )
    given = wanted.arguments(range(1, 3))
    assert given["class_labels"] == [8, 9]
    assert torch.equal(given["prompt_embeds"], embeds[1:3]) and given["ages"].tolist() == [1, 2]
    assert given["prompt"] == ["a cat"] * 2 and given["negative_prompt_2"] == ["blurred"] * 2
    assert given["mode"] == "fast" and given["original_size"] == (4, 4, 4, 4)
    assert given["guidance_scale"] == 2.0 and given["offset"] == 1.0
    assert given["timesteps"] == [9, 6, 3] and given["options"] == {"a": 1}


def test_shared_lists_stay_whole() -> None:
    wanted = plan_images({"w": [1.0, 2.0]}, samples=2, seed=0, steps=1, shared=("w",))
    assert wanted.arguments(range(1)) == {"w": [1.0, 2.0]}


def test_rows_say_how_many_images() -> None:
    found = functools.partial(plan_images, samples=None, seed=0, steps=1, shared=())
    assert found({"prompt": ["a", "b", "c"]}).samples == 3
    assert found({"prompt": "a"}).samples == found({}).samples == 8


@pytest.mark.parametrize(
    "arguments, samples, shared, message",
    [
        ({"prompt": ["a", "b"]}, 3, (), r"prompt has 2 rows for 3 images.*shared=\('prompt',\)"),
        ({"a": torch.zeros(2, 1), "b": [1] * 4}, None, (), "b has 4 rows for 2 images"),
        ({"prompt": []}, None, (), "nothing to draw: prompt is empty"),
        ({"generator": None}, 2, (), "generator cannot be given: every image has one of its own"),
        ({"num_images_per_prompt": 2}, 2, (), "cannot be given: repeat the prompts"),
        ({"parallel": True}, 2, (), "parallel cannot be given: each process compares by itself"),
        ({"prompt": "a"}, 2, ("w",), "shared names 'w', which is none of the arguments"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, samples, shared, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_images(arguments, samples=samples, seed=0, steps=1, shared=shared)


def test_each_call_is_told_its_own_prompts() -> None:
    pipeline = Told(Gain(), diffusers.DDIMScheduler())
    draw = pipeline_sampler(pipeline, images(3, prompt=["a", "b", "c"], strength=0.5))
    in_batches(draw, 3, 2)
    more = {"strength": 0.5}
    assert pipeline.unet.seen == [(["a", "b"], 3, "np", more), (["c"], 3, "np", more)]


# ---------------------------------------------------------------- pipelines


def test_the_pipeline_stays_as_it_is() -> None:
    pipeline = PIPELINES["ddpm"]()
    pipeline.set_progress_bar_config(desc="mine")
    pipeline.scheduler.set_timesteps(7)
    before = dict(vars(pipeline)), dict(vars(pipeline.scheduler))
    pipeline_sampler(pipeline, images(), denoiser=Gain())(range(2))
    for old, new in zip(before, (vars(pipeline), vars(pipeline.scheduler)), strict=True):
        assert old.keys() == new.keys() and all(new[name] is value for name, value in old.items())


def test_another_denoiser_takes_the_place_of_the_pipelines() -> None:
    pipeline, other = PIPELINES["ddim"](), Gain()
    pipeline_sampler(pipeline, images(), denoiser=other)(range(2))
    assert other.seen and not pipeline.unet.seen
    pipeline_sampler(pipeline, images(), denoiser=other, component="unet")(range(2))
    assert not pipeline.unet.seen


class Two(Told):
    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, scheduler: Any) -> None:
        diffusers.DiffusionPipeline.__init__(self)
        self.register_modules(
            transformer=transformer, transformer_2=transformer_2, scheduler=scheduler
        )


class NoGenerator(Told):
    def __call__(self, prompt):
        raise AssertionError


class Part(Told):
    def __init__(self, vae: nn.Module, scheduler: Any) -> None:
        diffusers.DiffusionPipeline.__init__(self)
        self.register_modules(vae=vae, scheduler=scheduler)


class Bare:
    components: dict[str, Any] = {"tokenizer": object()}  # noqa: RUF012


class Unscheduled:
    def __init__(self) -> None:
        self.components = {"unet": Gain()}


def test_pipelines_that_cannot_be_compared_are_refused() -> None:
    scheduler = diffusers.DDIMScheduler()
    told = images(prompt="a")
    for pipeline, wanted, options, message in (
        (Bare(), told, {}, r"this Bare has no denoiser \(components: tokenizer\)"),
        (Unscheduled(), told, {}, r"this Unscheduled has no scheduler \(components: unet\)"),
        (NoGenerator(Gain(), scheduler), told, {}, "this NoGenerator takes no generator"),
        (Told(Gain(), scheduler), images(), {}, "this Told draws an image for each prompt"),
        (
            Told(Gain(), scheduler),
            images(prompt="a", output_type="latent"),
            {},
            'output_type="latent" gives no images to compare',
        ),
        (Part(Gain(), scheduler), told, {"denoiser": Gain()}, "component=<one of vae>"),
        (
            Two(Gain(), Gain(), scheduler),
            told,
            {"denoiser": Gain()},
            "which part of this Two.*component=<one of transformer, transformer_2>",
        ),
        (
            Told(Gain(), scheduler),
            told,
            {"denoiser": Gain(), "component": "vae"},
            "component='vae' is no module of this Told; it has unet",
        ),
        (
            Told(Gain(), scheduler),
            told,
            {"denoiser": nn.Linear(1, 1)},
            "the candidate, a Linear, has no .config, which pipelines read",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline_sampler(pipeline, wanted, **options)
    pipeline_sampler(Two(Gain(), Gain(), scheduler), told)  # as it is, it needs no name


class Fewer(Told):
    def __call__(self, prompt, num_inference_steps=2, generator=None, answer=None):
        return answer if answer is not None else (np.zeros((1, 8, 8, 3)),)


def test_what_a_pipeline_draws_is_looked_at() -> None:
    pipeline = Fewer(Gain(), diffusers.DDIMScheduler())
    with pytest.raises(ConfigError, match="this Fewer drew 1 images where 2 were due"):
        pipeline_sampler(pipeline, images(prompt="a"))(range(2))
    frames = types.SimpleNamespace(frames=[])
    with pytest.raises(ConfigError, match=r"must draw images \(n, .*, got NoneType"):
        pipeline_sampler(pipeline, images(prompt="a", answer=frames))(range(2))


# ---------------------------------------------------------------- images


def test_all_forms_of_images_become_one() -> None:
    from PIL import Image

    levels = torch.randint(0, 256, (2, 5, 4, 3), generator=torch.Generator().manual_seed(0))
    pixels = levels.to(torch.uint8).numpy()
    expected = (levels.float() / 255 * 2 - 1).movedim(-1, 1)
    for form in (
        [Image.fromarray(each) for each in pixels],
        pixels,
        list(pixels),
        (levels.float() / 255).numpy(),
        (levels.float() / 255).movedim(-1, 1),
        list((levels.float() / 255).movedim(-1, 1)),
    ):
        found = to_tensor(form)
        assert torch.equal(found, expected) and found.dtype == torch.float32
    grey = to_tensor([Image.fromarray(each[..., 0]) for each in pixels])
    assert torch.equal(grey, expected[:, :1])


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "got NoneType"),
        ([], "got list"),
        (np.zeros((2, 3)), r"got \(2, 3\)"),
        (np.zeros((2, 3, 4, 4, 3)), r"got \(2, 3, 4, 4, 3\)"),
        (np.full((1, 4, 4, 3), -1.0), r"run from -1 to -1; they must lie in \[0, 1\]"),
        (torch.full((1, 3, 4, 4), 1.5), "run from 1.5 to 1.5"),
    ],
)
def test_what_are_no_images_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_tensor(given)
