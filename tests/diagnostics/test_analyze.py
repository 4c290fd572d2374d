"""analysis: what could be done is told without doing it, on the meta device too."""

import json

import pytest
import torch
from torch import nn

from tests.toys import (
    BranchesOnBatch,
    Small,
    ToyDiT,
    ToyUNet,
    cifar10_unet,
    seeded,
    tiny_unet2d,
)
from tfmq_fx import ConfigError, analyze, fold_timesteps
from tfmq_fx.diagnostics.graph_drawing import Drawing

DIT_INPUTS = (torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4]))


@pytest.fixture(scope="module")
def dit():
    return analyze(seeded(ToyDiT).eval(), DIT_INPUTS)


@pytest.fixture(scope="module")
def found():
    return analyze(tiny_unet2d(), steps=20)


def test_parameters_are_divided_among_binding_times(found):
    data, model = found.data, tiny_unet2d()
    assert data["model"] == "UNet2DModel"
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(row["parameters"] for row in data["bindings"].values()) == data["parameters"]
    layers = ("time_embedding", "time_emb_proj")
    named = model.named_parameters()
    temporal = sum(p.numel() for n, p in named if any(part in n for part in layers))
    assert data["bindings"]["t"]["parameters"] == data["block"]["parameters"] == temporal
    assert data["block"]["weight_bytes"] == 4 * temporal
    assert data["bindings"]["c"]["parameters"] == data["bindings"]["(t, c)"]["parameters"] == 0


def test_row_bytes_are_those_of_the_table_that_folding_makes(found):
    folded = fold_timesteps(tiny_unet2d(), 20)
    assert found.data["steps"] * found.data["block"]["row_bytes"] == folded.gm.temporal_table.nbytes


def test_it_works_on_the_meta_device(found):
    meta = analyze(tiny_unet2d().to("meta"), steps=20).data
    for key in ("model", "parameters", "nodes", "bindings", "block", "steps"):
        assert meta[key] == found.data[key], key


def test_large_models_are_analysed_without_memory():
    with torch.device("meta"):
        model = cifar10_unet(divide=1)
    data = analyze(model).data
    assert data["parameters"] == 35_746_307  # google/ddpm-cifar10-32
    assert data["bindings"]["t"]["parameters"] > 1_000_000


def test_the_text_and_the_data_can_be_kept(found):
    assert json.loads(json.dumps(found.data)) == found.data
    text = str(found)
    assert "binding time   nodes       parameters     share         FLOPs     share" in text
    assert f"{found.data['parameters']:,} parameters" in text
    for name, shape, _ in found.data["block"]["features"]:
        assert f"  {name} {tuple(shape)}" in text
    assert "for 20 steps, in place of 73.3 KiB of weights" in text
    assert "shared by several: time_embedding.linear_1, time_embedding.linear_2" in text


def test_conditions_have_a_binding_time_of_their_own(dit):
    model = seeded(ToyDiT)
    without = analyze(model.eval(), DIT_INPUTS, conditions=()).data
    for given in (dit.data, analyze(model, DIT_INPUTS, conditions=["y"]).data):
        assert given["bindings"]["c"]["parameters"] == model.label.weight.numel()
        modulation = 2 * (32 * 192 + 192)
        assert given["bindings"]["(t, c)"]["parameters"] == modulation
        total = sum(r["parameters"] for r in given["bindings"].values())
        assert total == sum(p.numel() for p in model.parameters())
        assert [i["binding"] for i in given["inputs"]] == ["x", "t", "c"]
    assert without["bindings"]["c"]["parameters"] == 0
    assert without["conditioned"]["conditions"] == []
    assert "fixed for a request" not in str(analyze(model, DIT_INPUTS, conditions=()))


def test_operations_are_divided_among_binding_times(dit):
    rows = {name: row["flops"] for name, row in dit.data["bindings"].items()}
    tokens, batch = 16, 2
    block = 2 * 32 * (96 + 32 + 64 + 64) * tokens + 2 * 2 * 4 * tokens * tokens * 8
    assert rows == {
        "constant": 0,
        "t": batch * 2 * 2 * 32 * 32,
        "c": 0,
        "(t, c)": batch * 2 * 2 * 32 * 192,
        "x": batch * (2 * tokens * 12 * 32 + 2 * block + 2 * tokens * 32 * 12),
    }
    assert dit.data["batch"] == batch and dit.data["flops"] == sum(rows.values())


def test_operations_are_counted_at_the_batch_of_the_example(dit):
    one = tuple(value[:1] for value in DIT_INPUTS)
    data = analyze(seeded(ToyDiT).eval(), one).data
    assert data["batch"] == 1 and 2 * data["flops"] == dit.data["flops"]
    apart = analyze(BranchesOnBatch(), (torch.randn(1, 4), torch.ones(1))).data
    assert apart["batch"] == 1  # its code reads the batch as a number: the graph is for one alone


def test_rows_and_savings_are_those_by_hand(dit):
    block, part, steps = dit.data["block"], dit.data["conditioned"], 50
    assert [(name, shape) for name, shape, _ in block["features"]] == [("time.2", [32])]
    assert block["uses"] == {"time.2": ["time.0", "time.2"]}
    assert block["row_bytes"] == 4 * 32 and block["table_bytes"] == steps * 4 * 32
    assert block["parameters"] == 2 * (32 * 32 + 32) and block["weight_bytes"] == 4 * 2112
    assert block["flops_saved"] == steps * dit.data["bindings"]["t"]["flops"]
    row = part["rows"]["(t, c)"]
    assert row["features"] == [[f"blocks.{i}.modulation", [192]] for i in (0, 1)]
    assert row["row_bytes"] == 2 * 2 * 192 and row["bytes"] == steps * row["row_bytes"]
    assert part["rows"]["t"]["features"] == part["rows"]["c"]["features"] == []
    assert part["conditions"] == ["y"]
    early = [dit.data["bindings"][name] for name in ("t", "c", "(t, c)")]
    assert part["parameters"] == sum(r["parameters"] for r in early)
    assert part["flops"] == sum(r["flops"] for r in early)


class SharesWeights(Small):
    """One layer on the timestep and on the sample, one on the timestep, one never called."""

    def __init__(self):
        super().__init__()
        self.late, self.idle = nn.Linear(4, 4), nn.Linear(3, 3)
        self.place = nn.Parameter(torch.randn(4))

    def forward(self, x, t):
        h = self.late(self.linear(t[:, None].float().expand(-1, 4)))
        return self.linear(x) + h + self.place[None] * 2


def test_parameters_belong_to_the_latest_time_that_uses_them():
    data = analyze(SharesWeights(), (torch.randn(2, 4), torch.ones(2))).data
    assert data["unused_parameters"] == 12
    assert data["bindings"]["t"]["parameters"] == data["block"]["parameters"] == 20
    assert data["bindings"]["x"]["parameters"] == 24  # the shared layer, and the constant's
    assert data["block"]["declined"] == [
        ["linear", "its weights serve the rest of the model as well"]
    ]


class TakesMuch(nn.Module):
    def forward(self, x, t, text, extra, down_block_residuals, noise_level):
        h = x * t[:, None, None, None] + text[:, :1, None] + extra["style"] + extra["more"][0]
        return h + down_block_residuals[0] + noise_level[:, None, None, None]


def test_conditions_are_what_is_fixed_or_what_is_named():
    inputs = {
        "x": torch.randn(2, 5, 3, 4),
        "t": torch.ones(2),
        "text": torch.randn(2, 3, 4),
        "extra": {"style": torch.randn(2, 1, 1, 4), "more": [torch.randn(2, 1, 1, 4)]},
        "down_block_residuals": [torch.randn(2, 1, 1, 4)],
        "noise_level": torch.ones(2),
    }

    def chosen(conditions):
        found = analyze(TakesMuch(), inputs, timestep="t", conditions=conditions)
        return found.data["conditioned"]["conditions"]

    assert chosen(None) == ["text", "extra.style", "extra.more.0"]
    assert chosen(["extra"]) == chosen(["extra_style", "extra.more"])
    assert chosen(["extra"]) == ["extra.style", "extra.more.0"]
    assert chosen("text") == ["text"] and chosen([]) == []
    for wrong in ("t", "extr", "style"):
        with pytest.raises(ConfigError, match=f"no input '{wrong}' for a condition") as caught:
            chosen([wrong])
        assert str(caught.value).endswith(
            "choose from x, text, extra.style, extra.more.0, down_block_residuals.0, noise_level"
        )


def test_configs_are_analysed_without_weights(tmp_path, found):
    tiny_unet2d().save_config(tmp_path)
    for path in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        data = analyze(path, steps=20).data
        for key in ("model", "parameters", "nodes", "bindings", "block", "flops"):
            assert data[key] == found.data[key], key


def test_what_suffixes_say_is_written(tmp_path, dit, monkeypatch):
    monkeypatch.setattr(Drawing, "svg", lambda self, depth: f"a picture, {depth} levels deep")
    for name, text in {
        "a.json": json.dumps(dit.data, indent=2) + "\n",
        "a.txt": f"{dit}\n",
        "a.dot": dit.dot(1),
        "a.svg": dit.svg(1),
    }.items():
        (tmp_path / name).write_text("old")
        dit.save(tmp_path / name, depth=1)
        assert (tmp_path / name).read_text() == text
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ConfigError, match=r"a.png: the name must end in one of .json, .txt"):
        dit.save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"nowhere/a.txt cannot be written: .*No such file"):
        dit.save(str(tmp_path / "nowhere" / "a.txt"))
    with pytest.raises(ConfigError, match="depth must be a whole number, at least 1, got 0"):
        dit.save(tmp_path / "b.svg", depth=0)
    assert not (tmp_path / "b.svg").exists()


def test_nothing_is_changed_or_computed():
    model = seeded(ToyUNet)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    analyze(model, (torch.randn(2, 3, 8, 8, generator=torch.Generator()), torch.tensor([1, 2])))
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inputs_in_doubt_are_refused():
    with pytest.raises(ConfigError, match="example_inputs cannot be derived for ToyUNet"):
        analyze(seeded(ToyUNet))
    for steps in (0, 2.5, True):
        with pytest.raises(ConfigError, match="steps must be a whole number, at least 1, got"):
            analyze(tiny_unet2d(), steps=steps)
    with pytest.raises(ConfigError, match="no input named 'tau'"):
        analyze(tiny_unet2d(), timestep="tau")
