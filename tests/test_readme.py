"""The README's own code runs as it stands, on a pipeline in the shape of Stable Diffusion."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tfmq_fx
from tests.stable_diffusion import pipeline
from tests.test_api import fast
from tfmq_fx.backends import auto

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(blocks: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables that the blocks leave, and how the model and the pipeline were before."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFMQ_FX_CACHE", str(folder / "cache"))
    pipeline(folder).save_pretrained(folder / "stable-diffusion")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "stable-diffusion")
    pipe.set_progress_bar_config(disable=True)
    unet = pipe.unet
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    given = {"pipe": pipe}
    for block in blocks:
        exec(compile(block, str(README), "exec"), given)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    return given


def check_first(given: dict[str, Any], backends: set[str]) -> None:
    """What the first block should have left."""
    pipe = given["pipe"]
    compiled, model = pipe.unet, given["model"]
    assert isinstance(compiled, tfmq_fx.Compiled) and compiled.backend in backends
    assert len(given["images"]) == 2 and given["images"][0].size == (64, 64)
    shapes = {spec.path: spec.shape for spec in model.call.inputs}
    assert shapes["encoder_hidden_states"] == ("batch", "text", 16)
    # The compiled model draws what the reference draws. Without guidance, which multiplies
    # differences; 30 dB is far below what rounding beside a boundary leaves here.
    settings = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent"}

    def drawn(unet: Any) -> torch.Tensor:
        pipe.unet = unet
        return pipe("a", generator=torch.Generator().manual_seed(0), **settings).images

    expected, found = drawn(model), drawn(compiled)
    assert float((found - expected).pow(2).mean() / expected.pow(2).mean()) < 1e-3
    pipe.unet = compiled
    with pytest.raises(tfmq_fx.InputError, match=r"was captured as 8, got 12.*'spatial'\)"):
        pipe("a", num_inference_steps=20, height=96, width=64)


@pytest.mark.slow
def test_the_first_example_runs_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One backend that compiles in place of a trial of all, and little to learn: minutes otherwise.
    monkeypatch.setattr(auto, "CANDIDATES", ("inductor",))
    monkeypatch.setitem(tfmq_fx.PRESETS, "w4a8", fast("w4a8"))
    check_first(run(BLOCKS[:1], tmp_path, monkeypatch), {"inductor"})


@pytest.mark.slow
def test_all_code_runs_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(BLOCKS) >= 3
    check_first(run(BLOCKS[:1], tmp_path, monkeypatch), set(auto.CANDIDATES))
    given = run(BLOCKS, tmp_path, monkeypatch)
    assert isinstance(given["model"], tfmq_fx.Bound) and given["pipe"].unet is given["unet"]
    printed = capsys.readouterr().out
    # how well random weights do at four bits, learnt on two prompts, is not the README's affair
    assert "lossy model, " in printed and "PSNR" in printed and "timestep_row" in printed
    assert {"unet-w4a8", "compared"} <= {path.name for path in tmp_path.iterdir()}


def test_other_resolutions_run_where_they_are_free(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    unet = pipe.unet
    settings = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 96}
    free = ("batch", "text", "spatial")
    prepared = tfmq_fx.prepare(unet, config="w8a8", dynamic=free)
    tfmq_fx.calibrate(prepared, pipe, ["a", "b", "c"], progress=False, num_inference_steps=2)
    pipe.unet = tfmq_fx.convert(prepared, progress=False)
    found = pipe("a", generator=torch.Generator().manual_seed(0), **settings).images
    pipe.unet = unet
    expected = pipe("a", generator=torch.Generator().manual_seed(0), **settings).images
    assert found.shape == expected.shape == (1, 4, 8, 12)
    # W8A8 of random weights, two steps under guidance: well over 20 dB
    assert float((found - expected).pow(2).mean() / expected.pow(2).mean()) < 1e-2


def test_a_pipeline_without_its_prompts_is_told(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    prepared = tfmq_fx.prepare(pipe.unet, config="w8a8")
    with pytest.raises(tfmq_fx.ConfigError, match=r"needs prompts: calibrate\(prepared, pipe, \["):
        tfmq_fx.calibrate(prepared, pipe, num_inference_steps=2)
    given = {"prompt_embeds": torch.randn(1, 20, 16), "guidance_scale": 1.0}
    tfmq_fx.calibrate(prepared, pipe, progress=False, num_inference_steps=2, **given)
