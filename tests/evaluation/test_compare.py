"""compare: pipelines against themselves, planted differences, and pipelines left as they were."""

from __future__ import annotations

import copy
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tfmq_fx
from tests import zoo
from tests.toys import seeded, tiny_unet2d
from tfmq_fx import Comparison, ConfigError, compare

SHAPE = (3, 16, 16)
quick = functools.partial(compare, num_inference_steps=3, progress=False)


def noisy(model: nn.Module, amount: float = 0.02) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += amount * parameter.std().nan_to_num(0.0) * noise
    return other


def pipeline(kind: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of random weights, and arguments for three images of it."""
    if kind in ("DDIM", "DDPM"):
        scheduler = getattr(diffusers, f"{kind}Scheduler")()
        return getattr(diffusers, f"{kind}Pipeline")(tiny_unet2d(), scheduler), {"samples": 3}
    vae = seeded(
        diffusers.AutoencoderKL, block_out_channels=(8,), norm_num_groups=4, latent_channels=4
    ).eval()
    if kind == "DiT":
        pipe = diffusers.DiTPipeline(zoo.model("dit-xl-2"), vae, diffusers.DDPMScheduler())
        return pipe, {"class_labels": [1, 207, 360]}
    draw = functools.partial(torch.randn, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, zoo.model("sd15"), scheduler, None, None, requires_safety_checker=False
    )
    texts = {"prompt_embeds": draw(), "negative_prompt_embeds": draw()}
    return pipe, {**texts, "height": 16, "width": 16, "guidance_scale": 3.0}


KINDS = ("DDIM", "DDPM", "DiT", "StableDiffusion")


@pytest.fixture(autouse=True)
def a_label_for_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiTPipeline takes 1000 to mean no class."""
    monkeypatch.setitem(zoo.ENTRIES["dit-xl-2"].reduced, "num_embeds_ada_norm", 1000)


def denoiser(pipe: Any) -> nn.Module:
    found: nn.Module = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    return found


# ---------------------------------------------------------------- the same


@pytest.mark.parametrize("seed", [0, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_equals_itself(kind: str, seed: int) -> None:
    pipe, given = pipeline(kind)
    for other in (pipe, copy.deepcopy(denoiser(pipe))):
        found = quick(
            pipe, other, seed=seed, batch_size=2, features=lambda x: x.flatten(1), **given
        )
        assert isinstance(found, Comparison) and found.deterministic and found.floor == math.inf
        assert [each.seed for each in found.per_image] == [seed, seed + 1, seed + 2]
        for each in found.per_image:
            assert (each.psnr, each.ssim, each.feature_distance) == (math.inf, 1.0, 0.0)
        assert found.worst == 0 and torch.equal(*found.pair)
        assert float(found.pair[0].std()) > 0.01  # there is something to see


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_make_other_images_whatever_the_batch(kind: str) -> None:
    pipe, given = pipeline(kind)
    other = noisy(denoiser(pipe))
    whole = quick(pipe, other, batch_size=3, **given)
    one = quick(pipe, other, batch_size=1, **given)
    for a, b in zip(whole.per_image, one.per_image, strict=True):
        # Sums of other batch sizes are ordered otherwise: 1e-6 where the weights make 1e-3 at
        # least, a relative 1e-3 or 0.01 dB; twice, for two pipelines, and some to spare.
        assert a.psnr == pytest.approx(b.psnr, abs=0.05) and 5 < a.psnr < 70
        assert a.ssim == pytest.approx(b.ssim, abs=1e-3) and a.ssim < 1
    assert whole.worst == min(range(3), key=lambda i: whole.per_image[i].ssim)
    assert not torch.equal(*whole.pair)
    # With a pipeline for the candidate it is the same.
    changed = type(pipe)(**{**pipe.components, **_part(pipe, other)}, **_settings(kind))
    again = quick(pipe, changed, batch_size=3, **given)
    assert again.per_image == whole.per_image and again.worst == whole.worst
    assert all(torch.equal(a, b) for a, b in zip(again.pair, whole.pair, strict=True))


def _part(pipe: Any, other: nn.Module) -> dict[str, nn.Module]:
    return {"transformer" if hasattr(pipe, "transformer") else "unet": other}


def _settings(kind: str) -> dict[str, Any]:
    return {"requires_safety_checker": False} if kind == "StableDiffusion" else {}


def test_images_are_paired_with_those_a_user_draws() -> None:
    """The reference's images are those of the pipeline called by hand, with a generator each."""
    pipe, given = pipeline("DiT")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler()
    found = quick(pipe, noisy(denoiser(pipe)), seed=5, batch_size=3, **given)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    drawn = pipe(**given, generator=generators, num_inference_steps=3, output_type="np").images
    expected = torch.from_numpy(drawn[found.worst]).movedim(-1, 0) * 2 - 1
    assert torch.equal(found.pair[0], expected)


def test_tables_are_exact_and_compare_says_so() -> None:
    pipe, given = pipeline("DDPM")
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(3)
    folded = tfmq_fx.fold_timesteps(pipe.unet, timesteps=scheduler)
    found = quick(pipe, folded, batch_size=1, **given)  # exact at batch 1
    assert [each.psnr for each in found.per_image] == [math.inf] * 3


def test_bytes_are_compared_where_bytes_are_drawn() -> None:
    pipe, given = pipeline("DDIM")
    found = quick(pipe, noisy(pipe.unet, 1e-5), output_type="pil", **given)
    floats = quick(pipe, noisy(pipe.unet, 1e-5), **given)
    levels = (found.pair[0] + 1) * 127.5
    # Bytes divided by 255 in float32 are off by 1e-7 relative, which is 3e-5 of a level.
    assert float((levels - levels.round()).abs().max()) < 1e-4
    assert all(each.psnr < math.inf for each in floats.per_image)
    assert {each.psnr > 60 for each in found.per_image} == {True}


# ---------------------------------------------------------------- planted differences


def test_a_class_that_was_changed_is_the_worst() -> None:
    pipe, _ = pipeline("DiT")
    other = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("class_embedder.embedding_table.weight"):
                parameter[207] += 1
    for seed in (0, 50):
        found = quick(pipe, other, class_labels=[1, 3, 360, 207, 4], seed=seed, batch_size=2)
        assert found.worst == 3
        changed = [each.psnr < math.inf for each in found.per_image]
        assert changed == [False, False, False, True, False]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_one_row_that_was_changed_is_the_worst(scheduler: str, batch_size: int) -> None:
    unet = tiny_unet2d()

    def plain(x: Tensor, t: Tensor, mark: Tensor) -> Tensor:
        answer: Tensor = unet(x, t).sample
        return answer

    def marked(x: Tensor, t: Tensor, mark: Tensor) -> Tensor:
        return plain(x, t, mark) + mark[:, None, None, None]

    marks = torch.zeros(7)
    marks[4], marks[5] = 0.3, 0.02
    source = (getattr(diffusers, scheduler)(), SHAPE)
    found = quick(plain, marked, source=source, mark=marks, seed=9, batch_size=batch_size)
    assert found.worst == 4 and found.per_image[4].seed == 13 and found.deterministic
    changed = [i for i, each in enumerate(found.per_image) if each.psnr < math.inf]
    assert changed == [4, 5]
    assert float((found.pair[0] - found.pair[1]).abs().max()) > 0.01


def test_a_candidate_that_draws_nan_is_worst_and_a_reference_is_refused() -> None:
    unet = tiny_unet2d()

    def breaks(x: Tensor, t: Tensor, mark: Tensor) -> Tensor:
        answer: Tensor = (
            unet(x, t).sample + torch.where(mark > 0, torch.nan, 0.0)[:, None, None, None]
        )
        return answer

    def plain(x: Tensor, t: Tensor, mark: Tensor) -> Any:
        return unet(x, t)

    mark = torch.tensor([0, 0, 1, 0])
    source = (diffusers.DDIMScheduler(), SHAPE)
    found = quick(plain, breaks, source=source, mark=mark)
    assert found.worst == 2 and math.isnan(found.per_image[2].psnr)
    assert [each.psnr for i, each in enumerate(found.per_image) if i != 2] == [math.inf] * 3
    with pytest.raises(ConfigError, match="the reference draws images with nan"):
        quick(breaks, plain, source=source, mark=mark)


class Restless(nn.Module):
    """A denoiser whose answer depends on how often it was asked."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet, self.calls = unet, 0
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype

    def forward(self, x: Tensor, t: Any) -> Any:
        self.calls += 1
        return self.unet(x * (1 + 1e-3 * self.calls), t)


def test_a_reference_that_does_not_repeat_itself_is_told() -> None:
    pipe = diffusers.DDIMPipeline(Restless(tiny_unet2d()), diffusers.DDIMScheduler())
    found = quick(pipe, tiny_unet2d(), samples=3, batch_size=2)
    assert not found.deterministic and 10 < found.floor < 80
    assert f"does NOT repeat itself: {found.floor:.1f} dB" in str(found)
    assert pipe.unet.calls == 3 * 3  # two batches, the first twice, of three steps


# ---------------------------------------------------------------- left as they were


class Breaks(Restless):
    def forward(self, x: Tensor, t: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("broken")
        return self.unet(x, t)


@pytest.mark.parametrize("kind", ["DDPM", "DiT"])
def test_pipelines_are_left_as_they_were(kind: str) -> None:
    pipe, given = pipeline(kind)
    pipe.set_progress_bar_config(desc="mine")
    pipe.scheduler.set_timesteps(7)
    part, other = denoiser(pipe), noisy(denoiser(pipe))

    def state() -> list[dict[str, Any]]:
        weights = {**part.state_dict(), **{f"other.{k}": v for k, v in other.state_dict().items()}}
        weights = {name: value.clone() for name, value in weights.items()}
        return [dict(vars(pipe)), dict(vars(pipe.scheduler)), dict(vars(part)), weights]

    before, random = state(), torch.get_rng_state()
    quick(pipe, other, **given)
    quick(pipe, pipe, **given)
    if kind == "DDPM":
        with pytest.raises(RuntimeError, match="broken"):
            quick(pipe, Breaks(other), **given)
    with pytest.raises(ZeroDivisionError):
        quick(pipe, other, features=lambda x: 1 / 0, **given)
    for old, new in zip(before, state(), strict=True):
        assert old.keys() == new.keys()
        for name, value in old.items():
            assert new[name] is value or (
                isinstance(value, Tensor) and torch.equal(new[name], value)
            ), name
    assert torch.equal(torch.get_rng_state(), random)
    assert denoiser(pipe) is part and pipe.scheduler.timesteps.shape == (7,)


# ---------------------------------------------------------------- results


def test_features_see_images_in_the_range_they_were_made_for() -> None:
    pipe, given = pipeline("DDIM")
    seen = []

    def features(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)

    quick(pipe, pipe, features=features, **given)
    x = seen[0]
    assert x.shape == (3, *SHAPE) and x.dtype == torch.float32 and not x.requires_grad
    assert float(x.min()) < -0.5 and float(x.max()) > 0.5 and float(x.abs().max()) <= 1


def test_the_shipped_classifiers_give_features() -> None:
    from tfmq_fx.evaluation import digits

    unet = digits.load_unet()
    pipe = diffusers.DDIMPipeline(unet, digits.make_scheduler())
    other = noisy(unet, 0.05)
    found = quick(pipe, other, samples=2, features=digits.load_classifier().features)
    distances = [each.feature_distance for each in found.per_image]
    assert all(value is not None and 0 < value < 2 for value in distances)


def test_the_result_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, given = pipeline("DDIM")
    found = compare(pipe, noisy(pipe.unet), num_inference_steps=2, out=tmp_path / "out", **given)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found.to_dict()
    assert (tmp_path / "out" / "worst.png").stat().st_size > 0
    shown = capsys.readouterr()
    assert shown.out == "" and "compare" in shown.err
    quick(pipe, pipe, **given)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- bad input


def refused(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        quick(*args, **kwargs)


def test_numbers_that_cannot_be_are_refused() -> None:
    pipe, _ = pipeline("DDIM")
    refused("samples must be a whole number, at least 1, got 0", pipe, pipe, samples=0)
    refused("samples must be a whole number, at least 1, got 2.0", pipe, pipe, samples=2.0)
    refused("batch_size must be a whole number, at least 1, got 0", pipe, pipe, batch_size=0)
    refused("num_inference_steps .* got True", pipe, pipe, num_inference_steps=True)
    refused("seed must be a whole number, at least 0, got -1", pipe, pipe, seed=-1)
    refused(
        "prompt has 2 rows for 3 images; give one for each", pipe, pipe, samples=3, prompt=["a"] * 2
    )


def test_what_is_no_pair_of_models_is_refused() -> None:
    pipe, given = pipeline("DDIM")
    unet, source = pipe.unet, (pipe.scheduler, SHAPE)
    refused("the reference must be a diffusers pipeline, got a UNet2DModel; .*source=", unet, unet)
    refused("candidate must be a diffusers pipeline or a denoiser .*, got a str", pipe, "model")
    refused("both models are denoisers; got a DDIMPipeline", unet, pipe, source=source)
    refused("both models are denoisers; got a str", "unet", unet, source=source)
    for wrong in (pipe.scheduler, (unet, SHAPE), (pipe.scheduler, (16, 16))):
        refused(r"source must be a \(scheduler, shape\) pair, the shape", unet, unet, source=wrong)
    refused("component= names what a candidate denoiser replaces", pipe, pipe, component="unet")
    refused("component= names", unet, unet, source=source, component="unet")
    refused("component='vae' is no module of this DDIMPipeline", pipe, unet, component="vae")
    refused("the candidate, a Linear, has no .config", pipe, nn.Linear(1, 1))
    texts, given = pipeline("StableDiffusion")
    refused("draws an image for each prompt, label or embedding", texts, texts, samples=2)
    refused('output_type="latent" gives no images', texts, texts, output_type="latent", **given)


def test_images_of_two_sizes_are_refused() -> None:
    from diffusers import UNet2DModel

    pipe, given = pipeline("DDIM")
    config = {**pipe.unet.config, "sample_size": 8}
    smaller = diffusers.DDIMPipeline(UNet2DModel.from_config(config), pipe.scheduler)
    message = r"draws images of \(3, 16, 16\) and the candidate of \(3, 8, 8\)"
    refused(message, pipe, smaller, **given)


def test_where_to_save_is_looked_at_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("drawn")

    file = tmp_path / "file"
    file.write_text("mine")
    source = (diffusers.DDIMScheduler(), SHAPE)
    refused(
        "out must be a directory that can be made: .*file", never, never, source=source, out=file
    )
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError):
        quick(never, never, source=source, out=tmp_path / "out")
