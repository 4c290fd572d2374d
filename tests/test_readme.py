"""The README's own code runs, from its first block to its last, on a pipeline of diffusers."""

import functools
import re
from pathlib import Path

import diffusers
import pytest
import torch

import tfmq_fx
from tests.test_api import fast
from tests.toys import tiny_unet2d

README = Path(__file__).parents[1] / "README.md"


def test_the_code_in_the_readme_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    # what Inductor makes of it, and learning, are tested elsewhere and take a minute
    monkeypatch.setattr(tfmq_fx, "compile", functools.partial(tfmq_fx.compile, backend="eager"))
    monkeypatch.setitem(tfmq_fx.PRESETS, "w4a8", fast("w4a8"))
    unet = tiny_unet2d(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    given = {"pipe": pipe}
    for block in blocks:
        exec(compile(block, str(README), "exec"), given)
    assert isinstance(given["model"], tfmq_fx.Bound) and pipe.unet is unet
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    printed = capsys.readouterr().out
    assert "lossy model, ok" in printed and "PSNR" in printed and "timestep_row" in printed
    assert {"unet-w4a8", "compared"} <= {path.name for path in tmp_path.iterdir()}
