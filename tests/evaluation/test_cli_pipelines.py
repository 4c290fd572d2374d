"""The commands for pipelines' directories: quantize, sample and bench."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import tfmq_fx
from tests.bench.cpu_models import nearest
from tests.tiny_pipelines import PIPELINES
from tfmq_fx.evaluation import denoiser_times
from tfmq_fx.evaluation.cli import main
from tfmq_fx.evaluation.cli_quantize import read_prompts
from tfmq_fx.pipelines.pipeline_folder import load_pipeline


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """w8a8 rounds to the nearest: there is nothing to learn about random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tfmq_fx.PRESETS, "w8a8", nearest(tfmq_fx.PRESETS["w8a8"]))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small Stable Diffusion."""
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    PIPELINES["sd15_text"]()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small DiT."""
    folder = tmp_path_factory.mktemp("classes") / "dit"
    PIPELINES["dit"]()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, quick: None) -> tuple[Path, int]:
    """The directory that one command makes of it, and the command's status."""
    out = source.parent / "out"
    prompts = source.parent / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    arguments = ["quantize", str(source), str(out), "--steps", "3", "--prompts", str(prompts)]
    return out, main([*arguments, "--guidance", "3", "--quiet", "--json"])


def test_quantize_writes_a_pipeline_of_the_same_form(made: tuple[Path, int], source: Path) -> None:
    out, status = made
    assert status == 0
    parts = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == parts
    pipe = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipe.unet, tfmq_fx.Converted) and len(pipe.unet.timesteps) == 3
    facts = pipe.unet.record["sampled"]
    assert facts["steps"] == 3 and facts["class"] == "UNet2DConditionModel"
    assert {path.name for path in out.parent.iterdir()} == {"pipeline", "out", "prompts.txt"}


def test_quantize_prints_one_json_object(
    classes: Path, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(classes), str(out), "--steps", "2", "--quiet"]
    assert main([*arguments, "--set", "class_labels=[1, 2]", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pipeline"] == "DiTPipeline" and facts["steps"] == 2
    found = facts["denoisers"]["transformer"]
    assert found["weight_coverage"] == 1.0 and found["bytes"] < found["float_bytes"]
    picture = tmp_path / "a.png"
    draw = ["sample", str(out), "--label", "3", "5", "--out", str(picture), "--backend", "eager"]
    assert main([*draw, "--quiet"]) == 0
    assert "drawn in" in capsys.readouterr().out
    assert not picture.exists()  # two pictures have numbers
    assert all(Image.open(tmp_path / f"a-{i}.png").size == (16, 16) for i in (1, 2))
    assert main(["sample", str(out), "--out", str(picture)]) == 1
    assert "a DiTPipeline needs --label" in capsys.readouterr().err


def test_sample_draws_what_the_pipeline_draws(
    made: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    draw = ["sample", str(made[0]), "--prompt", "a cat", "--negative-prompt", "a dog", "--quiet"]
    more = ["--guidance", "3", "--seed", "4", "--backend", "eager", "--json"]
    assert main([*draw, *more, "--out", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == [str(picture)] and facts["backends"] == {"unet": "eager"}
    assert facts["steps"] == 3  # those it was made for
    pipe = load_pipeline(made[0])
    expected = pipe(
        ["a cat"],
        negative_prompt=["a dog"],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    assert Image.open(picture).tobytes() == expected.tobytes()


def test_bench_compares_with_the_compiled_original(
    made: tuple[Path, int],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dtypes: list[Any] = []

    def compile(model: Any) -> Any:
        dtypes.append(model.dtype)
        return model

    monkeypatch.setattr(torch, "compile", compile)  # compiling is torch's affair
    bench = ["bench", str(made[0]), "--rounds", "2", "--backend", "eager", "--quiet"]
    assert main([*bench, "--json", "--reference", str(source)]) == 0
    found = json.loads(capsys.readouterr().out)["denoisers"]["unet"]
    names = [row["name"] for row in found["times"]]
    assert names == ["tfmq_fx w8a8, eager", *denoiser_times.BASELINES]
    assert dtypes == [torch.bfloat16, torch.float32]
    best = min(row["median"] for row in found["times"][1:])
    assert found["speedup"] == pytest.approx(best / found["times"][0]["median"])
    assert found["sqnr"] > 20
    assert main(bench) == 0
    text = capsys.readouterr().out
    assert "random weights from the config" in text and "SQNR" not in text
    assert main(["bench", str(source)]) == 1
    assert "has no quantized denoiser: make one with tfmq-fx quantize" in capsys.readouterr().err


@pytest.mark.parametrize(
    "moment", [(tfmq_fx.Converted, "save_pretrained"), (tfmq_fx.api, "convert")]
)
def test_an_interrupted_run_leaves_nothing(
    moment: tuple[Any, str],
    classes: Path,
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(*moment, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    arguments = ["quantize", str(classes), str(tmp_path / "out"), "--steps", "2", "--quiet"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
    try:
        assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("tfmq-fx: interrupted\n")
    assert not [*tmp_path.iterdir()]


def test_wrong_directories_are_told(
    source: Path, made: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    out = str(tmp_path / "out")
    for arguments, message in (
        (["quantize", str(tmp_path / "no"), out], "there is no such directory"),
        (["quantize", str(tmp_path / "full"), out], "it has no model_index.json. Give the dir"),
        (["quantize", str(source / "unet"), out], "is one model without its pipeline"),
        (["quantize", str(made[0]), out], "pipe.unet is a Converted of tfmq_fx already"),
        (["quantize", str(source), str(source)], "must lie outside of DIR"),
        (["quantize", str(source), str(tmp_path / "full")], "holds other files than a quantized"),
        (["quantize", str(source), out, "--prompts", out], "cannot be read as text"),
        (["quantize", str(source), out, "--config", "w9"], "unknown config 'w9'"),
        (["quantize", str(source), out, "--set", "height"], "'height' must be NAME=VALUE"),
        (["quantize", str(source), out, "--set", "heigth=8"], "takes no heigth="),
        (["quantize", str(source), out, "--image", out], "cannot be read as an image"),
        (["sample", str(source), "--out", "a.jpg"], "the name must end in .png"),
        (["sample", str(source), "--out", f"{out}.png"], "needs --prompt"),
        (["sample", str(source), "--out", f"{out}.png", "--label", "1"], "takes no --label"),
        (["bench", str(made[0]), "--rounds", "0"], "--rounds must be a whole number"),
    ):
        assert main([*arguments, "--quiet"]) == 1, arguments
        found, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("tfmq-fx: ")]
        assert found == "" and message in lines[0] and "Traceback" not in err
    assert not Path(out).exists()


def test_a_torn_pipeline_is_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text((source / "model_index.json").read_text())
    assert main(["sample", str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "a.png")]) == 1
    assert "the pipeline cannot be loaded: " in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text("[")
    assert main(["quantize", str(tmp_path), str(tmp_path.parent / "out")]) == 1
    assert "model_index.json is not JSON" in capsys.readouterr().err


def test_videos_become_a_grid_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfmq_fx.evaluation.cli_sample import _pictures

    frames = [Image.new("RGB", (4, 2), (i, 0, 0)) for i in range(5)]
    (grid,) = _pictures(type("Drawn", (), {"frames": [frames]})())
    assert grid.size == (12, 4) and grid.getpixel((4, 2)) == (4, 0, 0)
    with pytest.raises(tfmq_fx.ConfigError, match="drew no pictures but a Sound"):
        _pictures(type("Sound", (), {"audios": [0]})())


def test_prompts_are_lines_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one, two", "three"]')
    assert read_prompts(tmp_path / "a.json") == ["one, two", "three"]
    (tmp_path / "a.txt").write_text("\n one \n\ntwo")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(tfmq_fx.ConfigError, match="has no prompts"):
        read_prompts(tmp_path / "a.txt")


def test_report_is_on_the_denoisers_of_a_pipeline(
    made: tuple[Path, int], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(made[0])]) == 0
    expected = tfmq_fx.report(tfmq_fx.load(made[0] / "unet"))
    assert capsys.readouterr().out == f"unet: {expected}\n"
    assert main(["report", str(source)]) == 1
    assert "has no quantized denoiser" in capsys.readouterr().err


COMMANDS = ["quantize", "sample", "bench", "demo", "report", "analyze", "verify", "evaluate"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert f"examples:\n  tfmq-fx {command} " in text and "130  interrupted" in text
