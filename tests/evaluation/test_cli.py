"""cli: it parses, calls the library, prints, and exits with a status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.diagnostics.test_graph_drawing import needs_graphviz
from tests.test_api import TIMES, data
from tests.toys import ToyUNet, seeded, tiny_unet2d
from tfmq_fx import Verification, __version__, fold_timesteps, load, report, save
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.diagnostics import verify as verification
from tfmq_fx.evaluation import demo
from tfmq_fx.evaluation.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save(fold_timesteps(seeded(ToyUNet).eval(), TIMES, data(8)[0]), path)
    return path


def test_report_prints_what_was_done_to_a_saved_model(saved, capsys):
    assert main(["report", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{report(load(saved))}\n" and err == ""


def test_errors_of_the_library_are_one_line_and_status_one(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tfmq-fx: ") and err.endswith("there is no such directory\n")
    assert len(err.splitlines()) == 1


def test_notes_of_errors_are_printed(monkeypatch, capsys):
    def fail(*args, **kwargs):
        error = ConfigError("no")
        error.add_note("in pass fold_timesteps")
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "tfmq-fx: no\n  in pass fold_timesteps\n"


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_analyze_prints_and_writes_what_a_config_is_worth(tmp_path, capsys):
    tiny_unet2d().save_config(tmp_path / "unet")
    capsys.readouterr()  # diffusers says here what it lacks, when it is imported first
    out = [str(tmp_path / f"found.{suffix}") for suffix in ("json", "txt", "dot")]
    arguments = ["analyze", str(tmp_path / "unet"), "--steps", "20", "--timestep", "timestep"]
    assert main([*arguments, "--depth", "1", "--out", *out[:2], "--out", *out[2:]]) == 0
    text, err = capsys.readouterr()
    assert err == "" and text == Path(out[1]).read_text()
    assert text.startswith("UNet2DModel: 177,427 parameters") and "for 20 steps" in text
    assert json.loads(Path(out[0]).read_text())["bindings"]["t"]["parameters"] == 18768
    assert Path(out[2]).read_text().startswith('digraph "UNet2DModel"')


@needs_graphviz
def test_analyze_draws(tmp_path, capsys):
    tiny_unet2d().save_config(tmp_path)
    out = tmp_path / "found.svg"
    assert main(["analyze", str(tmp_path), "--depth", "1", "--out", str(out)]) == 0
    picture = out.read_text()
    assert "<svg " in picture and ">mid_block<" in picture and "linear_1<" not in picture


def test_analyze_tells_what_a_picture_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    tiny_unet2d().save_config(tmp_path)
    out = tmp_path / "found.svg"
    assert main(["analyze", str(tmp_path), "--out", str(out)]) == 1
    assert 'pip install "tfmq_fx[draw]"' in capsys.readouterr().err and not out.exists()


def test_analyze_tells_what_is_wrong(tmp_path, capsys):
    tiny_unet2d().save_config(tmp_path)
    config = str(tmp_path / "config.json")
    for arguments, message in (
        ([str(tmp_path / "nothing")], "there is no such file or directory"),
        ([config, "--condition", "text"], "no input 'text' for a condition; choose from sample"),
        ([config, "--timestep", "tau"], "no input named 'tau'"),
        ([config, "--steps", "0"], "steps must be a whole number, at least 1, got 0"),
    ):
        assert main(["analyze", *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("tfmq-fx: ") and message in err
    assert main(["analyze", config, "--out", str(tmp_path / "a.png")]) == 1
    assert "a.png: the name must end in one of .json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A reference, the model made from it, and another reference."""
    path = tmp_path_factory.mktemp("compared")
    reference = tiny_unet2d()
    reference.save_pretrained(path / "reference")
    save(fold_timesteps(reference, [0, 500]), path / "model")
    with torch.no_grad():
        reference.conv_out.weight[0].mul_(1.01)
    reference.save_pretrained(path / "other")
    return path


def test_verify_prints_and_writes_and_its_status_tells(compared, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = ["verify", str(compared / "reference"), str(compared / "model"), "--quiet"]
    assert main([*arguments, "--json", str(out)]) == 0
    text, err = capsys.readouterr()
    assert err == "" and text.startswith("exact model, ok: batch 1 equal bit for bit")
    found = json.loads(out.read_text())
    assert found["ok"] and found["pooled"] == "inf" and len(found["steps"]) == 2
    arguments[1] = str(compared / "other")
    assert main([*arguments, "--json", str(out)]) == 2
    text, err = capsys.readouterr()
    assert "NOT OK" in text and "not the reference's: conv_out.weight" in text
    assert json.loads(out.read_text())["changed"] == ["conv_out.weight"]


def test_verify_tells_what_is_wrong(compared, tmp_path, capsys):
    reference, model = str(compared / "reference"), str(compared / "model")
    for arguments, message in (
        ([str(tmp_path), model], "nor a directory with the config.json"),
        ([reference, str(tmp_path)], "is not a model saved by tfmq_fx"),
        (["glyphs", model], "forward has no 'sample'"),
        ([reference, model, "--json", str(tmp_path / "no" / "a.json")], "cannot be written"),
    ):
        assert main(["verify", *arguments, "--quiet"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("tfmq-fx: ") and message in err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], {"threshold": None, "seed": 0, "progress": True}),
        (
            ["--threshold", "30.5", "--seed", "7", "--quiet"],
            {"threshold": 30.5, "seed": 7, "progress": False},
        ),
    ],
)
def test_verify_gets_its_arguments(monkeypatch, compared, capsys, arguments, expected):
    seen = []

    def verify(reference, model, **options):
        seen.append((type(reference).__name__, type(model).__name__, options))
        return Verification(False, False, (0.0, 0.0), {0.0: 30.0}, [], [], 30.0, threshold=30.5)

    monkeypatch.setattr(verification, "verify", verify)
    assert main(["verify", "digits", str(compared / "model"), *arguments]) == 2
    assert seen == [("UNet2DModel", "Converted", expected)]
    assert "output SQNR 30.0 dB, asked for 30.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], (Path("demo-out"), {"samples": 512, "progress": True})),
        (
            ["--out", "a/b", "--samples", "7", "--quiet"],
            (Path("a/b"), {"samples": 7, "progress": False}),
        ),
    ],
)
def test_demo_gets_its_arguments(monkeypatch, arguments, expected):
    seen = []
    monkeypatch.setattr(demo, "run", lambda out, **options: seen.append((out, options)))
    assert main(["demo", *arguments]) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "the following arguments are required: command"),
        (["paint"], "invalid choice: 'paint'"),
        (["quantize", "a"], "the following arguments are required: OUT"),
        (["report"], "the following arguments are required: model"),
        (["analyze"], "the following arguments are required: model"),
        (["demo", "--samples", "many"], "invalid int value: 'many'"),
        (["verify", "digits"], "the following arguments are required: model"),
        (["verify", "a", "b", "--threshold", "high"], "invalid float value: 'high'"),
    ],
)
def test_wrong_arguments_are_told(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.strip() == __version__


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "tfmq_fx.evaluation.cli", "report", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "is not a model saved by tfmq_fx" in done.stderr
