"""quantize_pipeline: one call, with all that a pipeline's own call takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tfmq_fx
from tests.bench.cpu_models import nearest
from tests.tiny_pipelines import PIPELINES
from tfmq_fx import PRESETS, ConfigError, Converted, PipelineReport, quantize_pipeline
from tfmq_fx.pipelines.default_inputs import PROMPTS

NEAREST = nearest(PRESETS["w8a8"])


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    """The latents that the pipeline draws."""
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(**options, generator=generator, output_type="latent")
    found = getattr(drawn, "images", None)
    return drawn.frames if found is None else found


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.pow(2).mean() / (found - expected).pow(2).mean()))


@pytest.mark.parametrize("family", ["sd_controlnet", "sd_inpainting", "pixart_sigma", "flux"])
def test_pipelines_draw_with_the_result(family: str) -> None:
    pipe, options = PIPELINES[family]()
    expected = draw(pipe, **options)
    name = "unet" if family.startswith("sd") else "transformer"
    original = getattr(pipe, name)
    weights = {key: value.clone() for key, value in original.state_dict().items()}
    call = dict(options)
    steps = call.pop("num_inference_steps")
    report = quantize_pipeline(pipe, NEAREST, steps=steps, progress=False, **call)
    model = getattr(pipe, name)
    assert isinstance(report, PipelineReport) and isinstance(model, Converted)
    assert report.models == {name: model} and report.replaced == {name: original}
    assert report.weight_coverage == 1.0 and report.data["sites"]
    assert str(report).startswith(f"{name}: recipe w8a8")
    # random weights at eight bits, two steps: well above; a wrong input would be near 0 dB
    assert sqnr(draw(pipe, **options), expected) > 20
    assert all(torch.equal(v, weights[k]) for k, v in original.state_dict().items())
    report.restore()
    assert getattr(pipe, name) is original and torch.equal(draw(pipe, **options), expected)


def test_each_of_two_transformers_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    convert = tfmq_fx.api.convert

    def kept(prepared: Any, checkpoint: Path, **options: Any) -> Converted:
        folders.append(checkpoint)
        return convert(prepared, **options)

    monkeypatch.setattr(tfmq_fx.api, "convert", kept)
    pipe, options = PIPELINES["wan22"]()
    expected = draw(pipe, **options)
    originals = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    call = {k: v for k, v in options.items() if k != "num_inference_steps"}
    report = quantize_pipeline(pipe, NEAREST, steps=4, checkpoint=tmp_path, progress=False, **call)
    assert folders == [tmp_path / "transformer", tmp_path / "transformer_2"]
    assert report.replaced == originals and report.models.keys() == originals.keys()
    layers = [len(each.data["sites"]) for each in report.reports.values()]
    assert len(report.data["sites"]) == sum(layers)
    assert sqnr(draw(pipe, **options), expected) > 20
    # each knows the timesteps that it is called at
    early, late = (model.timesteps for model in report.models.values())
    assert early is not None and late is not None and float(early.min()) > float(late.max())


def test_prompts_labels_and_samples_have_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def calibrate(prepared: Any, pipeline: Any, **options: Any) -> None:
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(tfmq_fx.api, "calibrate", calibrate)
    monkeypatch.setattr(tfmq_fx.api, "prepare", lambda module, inputs, **_: inputs)
    for family in ("sd15_text", "dit", "ddpm"):
        pipe, _ = PIPELINES[family]()
        before = dict(vars(pipe))
        with pytest.raises(KeyboardInterrupt):
            quantize_pipeline(pipe, steps=2)
        assert vars(pipe) == before
    text, labels, plain = seen
    assert text["prompt"] == [*PROMPTS] and text["output_type"] == "latent"
    assert text["batch_size"] == 2  # two prompts at a time
    assert labels["class_labels"] == [0, 125, 250, 375, 500, 625, 750, 875]
    assert plain["samples"] is None and plain["batch_size"] is None


def test_bound_and_compiled_results() -> None:
    pipe, _ = PIPELINES["dit"]()
    report = quantize_pipeline(
        pipe, NEAREST, steps=2, class_labels=[1, 2], bind=True, compile="eager", progress=False
    )
    assert isinstance(report.models["transformer"], tfmq_fx.Bound)
    assert isinstance(pipe.transformer, tfmq_fx.Compiled)
    assert pipe.transformer.backend == "eager" and report.data["compiled"]["backend"] == "eager"
    assert report.data["sampled"]["steps"] == 2
    pipe([1], num_inference_steps=2)


@pytest.mark.parametrize(
    "family, arguments, message",
    [
        ("ddim", {"config": "w9"}, r"unknown config 'w9'"),
        ("ddim", {"budget": "a lot"}, r"budget 'a lot' is not understood"),
        ("ddim", {"steps": 0}, r"steps must be a whole number, at least 1"),
        ("ddim", {"seed": -1}, r"seed must be a whole number, at least 0"),
        ("ddim", {"compile": 3}, r"compile must be True, False or a backend's name, got 3"),
        ("ddim", {"component": "vae"}, r"component='vae' is no denoiser of this DDIMPipeline"),
        ("ddim", {"prompts": ["a"]}, r"a DDIMPipeline takes no prompts"),
        ("ddim", {"guidance": 2.0}, r"a DDIMPipeline takes no guidance=; it takes batch_size, "),
        ("ddim", {"num_inference_steps": 2}, r"give steps= and seed= in place of num_inf"),
        ("dit", {"samples": 3}, r"leave out samples: a DiTPipeline draws as many as"),
        ("sd15", {}, r"no text encoder, so it takes no prompts: .* prompt_embeds="),
        ("sd15_text", {"prompts": []}, r"prompts is empty"),
        ("sd15_text", {"prompts": 3}, r"prompts must be a text or a list of texts, got 3"),
        ("sd15_text", {"prompts": "a", "prompt": "b"}, r"give prompts= or prompt=, not both"),
        ("svd", {}, r"a StableVideoDiffusionPipeline needs image="),
    ],
)
def test_errors_come_before_long_work(
    family: str, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = PIPELINES[family]()
    monkeypatch.setattr(tfmq_fx.api, "prepare", lambda *_, **__: pytest.fail("long work"))
    with pytest.raises(ConfigError, match=message):
        quantize_pipeline(pipe, **arguments)


def test_an_unknown_backend_is_told_before_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = PIPELINES["ddim"]()
    monkeypatch.setattr(tfmq_fx.api, "prepare", lambda *_, **__: pytest.fail("long work"))
    with pytest.raises(tfmq_fx.BackendError, match="unknown backend 'tensorrt'"):
        quantize_pipeline(pipe, compile="tensorrt")


def test_pipelines_of_pipelines_are_told() -> None:
    pipe, _ = PIPELINES["ddim"]()
    pipe.decoder_pipe = PIPELINES["ddpm"]()[0]
    with pytest.raises(ConfigError, match=r"quantize each of these, pipe\.decoder_pipe"):
        quantize_pipeline(pipe)
