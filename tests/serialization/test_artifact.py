import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import fx, nn

from tests.serialization.test_graph_json import INPUTS, make_net, one_node
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.serialization import artifact
from tfmq_fx.serialization.artifact import GRAPH_FILE, TENSORS_FILE, Loaded, load, save, saved_bytes
from tfmq_fx.serialization.graph_json import to_json

BESIDE = {"call": {}, "config": {}, "extra": {}}


@pytest.fixture
def net():
    return make_net()


def holding(**tensors):
    """A graph that returns tensors of its own."""
    root, graph = nn.Module(), fx.Graph()
    for name, value in tensors.items():
        if isinstance(value, nn.Parameter):
            root.register_parameter(name, value)
        else:
            root.register_buffer(name, value)
    graph.output(tuple(graph.get_attr(name) for name in tensors))
    return fx.GraphModule(root, graph)


def edit(directory, change):
    """Rewrite the JSON of a save after `change` has been made to it; its SHA-256 is right again."""
    path = directory / GRAPH_FILE
    document = json.loads(path.read_text())
    document.pop("sha256", None)
    change(document)
    path.write_text(sealed(json.dumps(document)))


def sealed(text):
    """A JSON object with the SHA-256 of its text as the last entry."""
    text = text.removesuffix("}")
    return f'{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}'


def downgraded(directory, version):
    """The save as an earlier version wrote it: without a SHA-256 of the JSON."""
    path = directory / GRAPH_FILE
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps(document | {"format_version": version}))


def store(directory, tensors):
    """Put other tensors into a save, with the size and hash that belong to them."""
    path = directory / TENSORS_FILE
    safetensors.torch.save_file(tensors, path)
    content = path.read_bytes()
    found = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(directory, lambda d: d["tensors"].update(found))


# ---------------------------------------------------------------- what comes back


def test_a_saved_model_is_loaded_bit_identical(net, tmp_path):
    call, config = {"inputs": ["x", "t"]}, {"name": "w4a8", "bits": (8, 4)}
    extra = {
        "sqnr": float("inf"),
        "nested": [{"loss": float("nan")}, None, True, 2, -0.0, "é\ud800"],
    }
    save(tmp_path / "model", gm=net, call=call, config=config, extra=extra)
    loaded = load(str(tmp_path / "model"))
    assert isinstance(loaded, Loaded)
    assert torch.equal(loaded.gm(*INPUTS), net(*INPUTS))
    assert loaded.gm.state_dict().keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.gm.state_dict()[name], value)
    assert loaded.call == call and loaded.config == {"name": "w4a8", "bits": [8, 4]}
    assert repr(loaded.extra) == repr(extra)
    assert not loaded.gm.training


class KeepsFirstToken(nn.Module):
    """What earlier versions made of a layer that reads a text, by RewriteSpec(first_token=True)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("linear_first_token", torch.randn(1, 1, 4))
        self.register_buffer("linear_first_output", self.linear(self.linear_first_token).detach())

    def forward(self, text, t):
        first = text[:, :1]
        known = torch.all(torch.eq(first, self.linear_first_token), dim=-1, keepdim=True)
        masked = torch.masked_fill(first, known, 0.0)
        y = self.linear(torch.cat([masked, text[:, 1:]], 1))
        kept = torch.where(known, self.linear_first_output, y[:, :1])
        return torch.cat([kept, y[:, 1:]], 1) * t[:, None, None]


def test_a_model_that_keeps_its_first_token_is_loaded(tmp_path):
    model = KeepsFirstToken().eval()
    text, t = torch.randn(2, 5, 4), torch.tensor([1, 2])
    text[0, 0] = model.linear_first_token
    gm = capture(model, {"text": text, "t": t}, timestep="t").gm
    save(tmp_path / "model", gm=gm, **BESIDE)
    loaded = load(tmp_path / "model").gm
    with torch.no_grad():
        assert torch.equal(loaded(text, t)[0], model(text, t))
        assert torch.equal(loaded(text, t)[0], gm(text, t)[0])


def test_saving_what_was_loaded_gives_the_same_files(net, tmp_path):
    save(tmp_path / "a", gm=net, **BESIDE)
    save(tmp_path / "b", gm=load(tmp_path / "a").gm, **BESIDE)
    for name in (GRAPH_FILE, TENSORS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(net, tmp_path):
    save(tmp_path / "a", gm=net, **BESIDE)
    gm = load(tmp_path / "a").gm
    save(tmp_path / "a", gm=gm, **BESIDE)
    assert torch.equal(gm(*INPUTS), net(*INPUTS))
    assert torch.equal(load(tmp_path / "a").gm(*INPUTS), net(*INPUTS))


def test_the_directory_holds_two_readable_files(net, tmp_path):
    save(tmp_path / "deep" / "model", gm=net, **BESIDE)
    files = {path.name: path.stat() for path in (tmp_path / "deep" / "model").iterdir()}
    assert set(files) == {GRAPH_FILE, TENSORS_FILE}
    assert len({stat.S_IMODE(found.st_mode) for found in files.values()}) == 1
    assert saved_bytes(tmp_path / "deep" / "model") == sum(f.st_size for f in files.values())
    document = json.loads((tmp_path / "deep" / "model" / GRAPH_FILE).read_text())
    assert document["format_version"] == 5 and document["torch"] == torch.__version__
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
]


def test_tensors_of_every_dtype_and_layout_come_back(tmp_path):
    torch.manual_seed(0)
    values = {}
    for dtype in DTYPES:
        name = str(dtype).replace("torch.", "of_")
        values[name] = (torch.randn(2, 3) * 9).to(dtype)
        values[f"{name}_0d"] = torch.tensor(1).to(dtype)
        values[f"{name}_none"] = torch.zeros(0, 2).to(dtype)
    values["turned"] = torch.randn(4, 3).t()
    values["last"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    values["expanded"] = torch.randn(3, 1).expand(3, 5)
    values["conjugate"] = torch.randn(2, 2, dtype=torch.complex64).conj()
    values["negative"] = torch.randn(2, dtype=torch.complex64).conj().imag
    values["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])
    values["parameter"] = nn.Parameter(torch.randn(2), requires_grad=False)
    gm = holding(**values)
    save(tmp_path / "a", gm=gm, **BESIDE)
    found = load(tmp_path / "a").gm
    for name, value in values.items():
        again = getattr(found, name)
        assert again.dtype == value.dtype and again.shape == value.shape, name
        assert isinstance(again, nn.Parameter) == isinstance(value, nn.Parameter)
        plain = [v.detach().resolve_conj().resolve_neg().reshape(-1) for v in (again, value)]
        assert torch.equal(*(v.contiguous().view(torch.uint8) for v in plain)), name
        assert again.stride() == value.stride(), name


def test_shared_tensors_are_saved_once_and_shared_again(tmp_path):
    whole = torch.randn(1000)
    weight = nn.Parameter(torch.randn(1000))
    gm = holding(a=whole, b=whole, view=whole.view(10, 100), part=whole[:10], c=weight, d=weight)
    save(tmp_path / "a", gm=gm, **BESIDE)
    names = safetensors.torch.load_file(tmp_path / "a" / TENSORS_FILE).keys()
    assert names == {"a", "view", "part", "c"}
    again = load(tmp_path / "a").gm
    assert again.a is again.b and again.c is again.d and isinstance(again.c, nn.Parameter)
    assert all(torch.equal(getattr(gm, n), getattr(again, n)) for n in ("b", "view", "part", "d"))


def test_loaded_tensors_are_aligned_as_torch_aligns_them(net, tmp_path):
    save(tmp_path / "a", gm=net, **BESIDE)
    assert {value.data_ptr() % 64 for value in load(tmp_path / "a").gm.state_dict().values()} == {0}


def test_tied_weights_stay_tied(net, tmp_path):
    save(tmp_path / "a", gm=net, **BESIDE)
    again = load(tmp_path / "a").gm
    assert again.tied.weight is again.lin.weight


def test_buffers_outside_the_state_dict_are_saved(net, tmp_path):
    net.register_buffer("offset", torch.randn(8), persistent=False)
    save(tmp_path / "a", gm=net, **BESIDE)
    again = load(tmp_path / "a").gm
    assert torch.equal(again.offset, net.offset) and "offset" not in again.state_dict()


def test_a_captured_unet_comes_back_bit_identical(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    capture = pytest.importorskip("tfmq_fx.capture.capture").capture
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 700])
    gm = capture(model, {"sample": x, "timestep": t}, timestep="timestep").gm
    save(tmp_path / "a", gm=gm, **BESIDE)
    again = load(tmp_path / "a").gm
    for batch in (x, torch.randn(1, 3, 8, 8)):
        found, expected = again(batch, t[: len(batch)]), gm(batch, t[: len(batch)])
        assert torch.equal(*(v if torch.is_tensor(v) else v[0] for v in (found, expected)))
    assert again.code == gm.code and again.state_dict().keys() == gm.state_dict().keys()


# ---------------------------------------------------------------- loading what is broken


@pytest.fixture
def saved(net, tmp_path):
    save(tmp_path / "model", gm=net, **BESIDE)
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["\0", "x" * 300, "loop"])
def test_names_of_no_directory_are_named(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ArtifactError, match=r"is no directory|there is no such directory"):
        load(tmp_path / name)


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(ArtifactError, match="nowhere: there is no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="nowhere holds no saved model"):
        saved_bytes(tmp_path / "nowhere")
    (saved / TENSORS_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"model.safetensors is missing"):
        load(saved)
    (saved / GRAPH_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"not a model saved by tfmq_fx: no tfmq_fx\.json"):
        load(saved)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format_version": 1}', "3", '{"format": "onnx"}'])
def test_foreign_json_is_refused(saved, text):
    (saved / GRAPH_FILE).write_text(text)
    with pytest.raises(ArtifactError, match="was not written by tfmq_fx"):
        load(saved)


@pytest.mark.parametrize("text", ["", "{", "\0", "[" * 50, '"' + '\\"' * 99_999])
def test_broken_json_is_refused(saved, text):
    (saved / GRAPH_FILE).write_text(text)
    with pytest.raises(ArtifactError, match="truncated or not JSON"):
        load(saved)


def test_json_that_is_not_text_is_refused(saved):
    (saved / GRAPH_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="truncated or not JSON"):
        load(saved)


def test_versions_and_keys_are_checked(saved):
    edit(saved, lambda d: d.update(format_version=6, novelty=1))
    with pytest.raises(ArtifactError, match=r"format_version 6, .* reads up to 5; install a newer"):
        load(saved)
    edit(saved, lambda d: d.update(format_version="1"))
    with pytest.raises(ArtifactError, match="format_version '1' is not a version number"):
        load(saved)
    edit(saved, lambda d: d.update(format_version=5))
    with pytest.raises(ArtifactError, match=r"unknown keys \['novelty'\]"):
        load(saved)
    edit(saved, lambda d: (d.pop("novelty"), d.pop("config")))
    with pytest.raises(ArtifactError, match=r"missing keys \['config'\]"):
        load(saved)


def test_truncated_and_altered_tensors_are_refused(saved):
    path = saved / TENSORS_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(
        ArtifactError, match=f"truncated or was altered: its bytes is {len(content) - 1}"
    ):
        load(saved)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="truncated or was altered: its sha256 is"):
        load(saved)
    path.write_bytes(b"nonsense")
    found = {"bytes": 8, "sha256": hashlib.sha256(b"nonsense").hexdigest()}
    edit(saved, lambda d: d["tensors"].update(found))
    with pytest.raises(ArtifactError, match=r"model.safetensors cannot be read"):
        load(saved)


def test_tensors_that_do_not_fit_the_graph_are_refused(saved):
    tensors = safetensors.torch.load_file(saved / TENSORS_FILE)
    tensors = {name: value.clone() for name, value in tensors.items()}
    store(saved, {k: v for k, v in tensors.items() if k != "offset"} | {"more": torch.zeros(1)})
    with pytest.raises(ArtifactError, match=r"missing \['offset'\], not used \['more'\]"):
        load(saved)
    store(saved, tensors | {"offset": torch.zeros(9)})
    with pytest.raises(ArtifactError, match=r"offset is torch.float32 \(9,\), but .* \(8,\)"):
        load(saved)
    store(saved, tensors | {"offset": torch.zeros(8, dtype=torch.int8)})
    with pytest.raises(ArtifactError, match=r"offset is torch.int8"):
        load(saved)


def test_a_saved_graph_cannot_run_code(saved, tmp_path):
    def plant(document):
        document["graph"]["nodes"][-2].update(
            op="call_function", target="os.system", args=[f"touch {tmp_path}/ran"]
        )

    edit(saved, plant)
    with pytest.raises(ArtifactError, match=r"may not call os.system"):
        load(saved)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- saving


def test_values_that_are_not_json_are_named(net, tmp_path):
    for beside, text in (
        ({"extra": {"a": [1, torch.zeros(1)]}}, r"extra\['a'\]\[1\]: a Tensor cannot"),
        ({"config": {"a": {3: 1}}}, r"config\['a'\]: key 3 is not a string"),
        ({"call": {"a": {1}}}, r"call\['a'\]: a set cannot"),
        ({"extra": {"a": 1 << 70}}, r"extra\['a'\]: .* does not fit into 64 bits"),
        ({"extra": {"a": {"$float": 1}}}, r"extra\['a'\]: the key '\$float' stands for"),
    ):
        with pytest.raises(ArtifactError, match=text):
            save(tmp_path / "a", gm=net, **(BESIDE | beside))
    assert not list(tmp_path.iterdir())


def test_graphs_that_cannot_be_saved_touch_nothing(tmp_path):
    with pytest.raises(ArtifactError, match=r"relu: a saved graph may not call builtins.eval"):
        save(tmp_path / "a", gm=one_node_named("relu", eval), **BESIDE)
    with pytest.raises(ArtifactError, match="a: the tensor is on the meta device"):
        save(tmp_path / "a", gm=holding(a=torch.empty(2, device="meta")), **BESIDE)
    with pytest.raises(ArtifactError, match=r"a: tensors of torch.uint16 cannot be saved"):
        save(tmp_path / "a", gm=holding(a=torch.zeros(2, dtype=torch.uint16)), **BESIDE)
    assert not list(tmp_path.iterdir())


def one_node_named(name, function):
    gm = one_node("call_function", torch.relu, "x")
    next(n for n in gm.graph.nodes if n.name == name).target = function
    return gm


def test_a_directory_of_others_is_left_alone(net, tmp_path):
    target = tmp_path / "theirs"
    target.mkdir()
    save(target, gm=net, **BESIDE)  # empty: may be used
    shutil.rmtree(target)
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="theirs is not empty and not a model saved by tfmq_fx"):
        save(target, gm=net, **BESIDE)
    (target / GRAPH_FILE).write_text('{"format": "other"}')
    with pytest.raises(ArtifactError, match="theirs is not empty and not a model saved by tfmq_fx"):
        save(target, gm=net, **BESIDE)
    assert (target / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ArtifactError, match="exists and is not a directory"):
        save(target / "thesis.tex", gm=net, **BESIDE)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_files_put_beside_a_save_are_not_deleted(saved, net):
    (saved / "README.md").write_text("a model card")
    with pytest.raises(ArtifactError, match=r"would delete: \['README.md'\]"):
        save(saved, gm=net, **BESIDE)
    assert (saved / "README.md").exists()
    load(saved)


def test_an_earlier_save_is_replaced(saved, net):
    with torch.no_grad():
        net.shift.add_(1)
    save(saved, gm=net, **BESIDE)
    assert torch.equal(load(saved).gm.shift, net.shift)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_link_to_a_directory_stays_a_link(saved, net, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    save(tmp_path / "link", gm=net, **BESIDE)
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "link")


def test_places_that_cannot_be_written_are_named(net, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot .*file"):
        save(tmp_path / "file" / "model", gm=net, **BESIDE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(ArtifactError, match=f"the directory {tmp_path} is not writable"):
            save(tmp_path / "model", gm=net, **BESIDE)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match=r"cannot save to .*model: .*No space left"):
            save(tmp_path / "model", gm=net, **BESIDE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Crash(BaseException):
    """Not an Exception, so that nothing catches it by accident."""


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("where", ["replace", "save_file", "write_text", "fsync", "sync"])
def test_a_crash_leaves_the_earlier_save_and_nothing_else(
    net, tmp_path, monkeypatch, where, earlier, nth
):
    target, calls = tmp_path / "model", []
    if earlier:
        save(target, gm=net, **BESIDE)
    before = {path.name: path.read_bytes() for path in target.iterdir()} if earlier else None
    owner = {
        "replace": os,
        "save_file": safetensors.torch,
        "write_text": Path,
        "fsync": os,
        "sync": artifact,
    }[where]
    real = getattr(owner, where)

    def crash(*arguments):
        calls.append(arguments)
        if len(calls) == nth:
            raise Crash
        return real(*arguments)

    with torch.no_grad():
        net.shift.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, crash)
        try:
            save(target, gm=net, **BESIDE)
        except Crash:
            found = {p.name: p.read_bytes() for p in target.iterdir()} if earlier else None
            assert found == before
        else:
            assert len(calls) < nth
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if target.exists() else [])
    save(target, gm=net, **BESIDE)
    assert torch.equal(load(target).gm.shift, net.shift)


def test_a_process_killed_between_the_renames_loses_nothing(saved, net):
    backup = saved.parent / ".model.previous"
    saved.rename(backup)  # what is left if power fails after the first rename
    assert torch.equal(load(saved).gm(*INPUTS), net(*INPUTS)) and saved_bytes(saved) > 0
    with torch.no_grad():
        net.shift.add_(1)
    save(saved, gm=net, **BESIDE)
    assert torch.equal(load(saved).gm.shift, net.shift)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_what_a_killed_save_left_is_removed_by_the_next(saved, net):
    left = saved.parent / f".model.new-{'0' * 16}"
    left.mkdir()
    (left / TENSORS_FILE).write_bytes(b"half")
    save(saved, gm=net, **BESIDE)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_the_saved_graph_is_what_to_json_gives(saved, net):
    assert json.loads((saved / GRAPH_FILE).read_text())["graph"] == to_json(net)
