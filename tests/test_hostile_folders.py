"""Saved folders in the hands of others: damaged, hostile, or no folders of files at all."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections import Counter

import pytest
import torch

import tfmq_fx
from tests import mutations
from tests.mutations import INPUTS, MODELS, call, seal
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.serialization.artifact import GRAPH_FILE, ORIGIN_FILE, TENSORS_FILE


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Saved models by name, made when they are first asked for."""
    made = {}

    def base(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("saved") / name.replace(" ", "-")
            MODELS[name](made[name])
        return made[name]

    return base


@pytest.fixture
def folder(bases, tmp_path):
    shutil.copytree(bases("folded"), tmp_path / "model")
    return tmp_path / "model"


def edited(folder, edit):
    """The folder with its JSON changed and its checksums right again."""
    document = json.loads((folder / GRAPH_FILE).read_text())
    edit(document)
    seal(folder, document)
    return folder


def node(document, target):
    return next(n for n in document["graph"]["nodes"] if target in n["target"])


# ---------------------------------------------------------------- every byte counts


def test_every_file_is_covered_byte_for_byte(bases, folder):
    shutil.rmtree(folder)
    shutil.copytree(bases("calibrated"), folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for at in {0, 1, len(content) // 3, len(content) // 2, len(content) - 40, len(content) - 1}:
            for bit in (1, 32):
                path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
                with pytest.raises(ArtifactError, match=r"tfmq_fx\.json|origin|model\.safetensors"):
                    tfmq_fx.load(folder)
        path.write_bytes(content)
    tfmq_fx.load(folder)


def test_space_that_means_nothing_counts(folder):
    path = folder / GRAPH_FILE
    path.write_text(path.read_text().replace(":", ": ", 1))
    with pytest.raises(ArtifactError, match="truncated or was altered"):
        tfmq_fx.load(folder)


def test_a_sealed_folder_does_not_pass_for_an_earlier_one(folder):
    path = folder / GRAPH_FILE
    path.write_text(path.read_text().replace('"format_version":5', '"format_version":3'))
    with pytest.raises(ArtifactError, match=r"unknown keys .'sha256'"):
        tfmq_fx.load(folder)


def test_folders_of_earlier_versions_load(bases, folder):
    document = json.loads((folder / GRAPH_FILE).read_text())
    del document["sha256"]
    (folder / GRAPH_FILE).write_text(json.dumps(document | {"format_version": 3}))
    found = call(tfmq_fx.load(folder))
    assert torch.equal(found, call(tfmq_fx.load(bases("folded"))))


def test_files_of_others_are_neither_read_nor_minded(folder):
    (folder / "README.md").write_text("a model card")
    (folder / "tfmq_fx.py").write_text("raise SystemExit")
    os.mkfifo(folder / "pipe")
    tfmq_fx.load(folder)


def test_files_that_the_json_does_not_list_are_named(bases, folder):
    edited(folder, lambda d: d.pop("origin"))
    with pytest.raises(ArtifactError, match=r"holds .'origin.json', .* says nothing"):
        tfmq_fx.load(folder)


# ---------------------------------------------------------------- no code, no other classes


def test_no_class_is_looked_up_outside_the_table(folder, tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    for name in ("payload:Out", "model.payload:Out", "dataclasses:Field", "tfmq_fx.config:Config"):
        output = {"kind": "object", "keys": ["a"], "children": [{"leaf": 0}], "class": name}
        edited(folder, lambda d, o=output: d["call"].update(output=o))
        with pytest.raises(ArtifactError, match=r"call.output.class: .*outputs=\[YourClass\]"):
            tfmq_fx.load(folder)
    assert not (tmp_path / "ran").exists() and "payload" not in sys.modules


# ---------------------------------------------------------------- kinds of files, and their sizes


@pytest.fixture
def limits():
    """20 seconds and 1 GiB more than there is; both are far more than refusing takes."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    room = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), room[1]))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, room)


@pytest.mark.parametrize("name", [GRAPH_FILE, TENSORS_FILE, ORIGIN_FILE])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "sparse", "link"])
def test_files_that_are_no_files_are_refused(folder, limits, kind, name):
    path = folder / name
    size = path.stat().st_size
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, size if name == ORIGIN_FILE else 1 << 41)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    if name == TENSORS_FILE and kind == "sparse":
        document = json.loads((folder / GRAPH_FILE).read_text())
        document["tensors"]["bytes"] = 1 << 41
        text = json.dumps({k: v for k, v in document.items() if k != "sha256"})[:-1]
        digest = hashlib.sha256(text.encode()).hexdigest()
        (folder / GRAPH_FILE).write_text(f'{text},"sha256":"{digest}"}}')
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        tfmq_fx.load(folder)


def test_links_to_files_are_followed(folder, tmp_path):
    (folder / TENSORS_FILE).rename(tmp_path / "blob")
    (folder / TENSORS_FILE).symlink_to(tmp_path / "blob")
    tfmq_fx.load(folder)


def test_a_folder_that_is_saved_over_is_not_hung_on(folder, limits):
    model = tfmq_fx.load(folder)
    (folder / GRAPH_FILE).unlink()
    os.mkfifo(folder / GRAPH_FILE)
    with pytest.raises(ArtifactError, match="not a model saved by tfmq_fx; left alone"):
        tfmq_fx.save(model, folder)


tower = "s0"
for _ in range(12):
    tower = f"({tower})**16"
HUGE = [
    ("modules", lambda g: {"class": "torch.nn.modules.transformer.Transformer", "arguments": {}}),
    ("modules", lambda g: {"class": "LowRank", "spec": {
        "rank": 1 << 20, "in_channels": 1 << 20, "out_channels": 1 << 20}}),
    ("modules", lambda g: {"class": "QuantTimestepTable", "spec": {
        "rows": 1, "widths": [1 << 36], "bits": 8, "integer_keys": True}}),
    ("modules", lambda g: {"class": "QuantLinear", "spec": {
        "weight_shape": [1 << 18, 1 << 18], "weight_bits": 8, "act_bits": None,
        "per_timestep": False, "bias": True}}),
    ("tensors", lambda g: {"shape": [1 << 36], "dtype": "float32", "parameter": False,
        "requires_grad": False, "persistent": True}),
]  # fmt: skip


@pytest.mark.parametrize(("table", "entry"), HUGE)
def test_what_is_claimed_is_not_built(folder, limits, table, entry):
    def claim(document):
        graph = document["graph"]
        first = next(iter(graph[table]))
        graph[table][first] = entry(graph)

    with pytest.raises(ArtifactError, match=r"tfmq_fx\.json"):
        tfmq_fx.load(edited(folder, claim))


TEXTS = [
    tower,
    "9**9**9",
    "((9**16)**16)**16",
    "-" * 100_000 + "1",
    "(" * 500 + "s0" + ")" * 500,
    "+".join(["s0"] * 5000),
    "*".join(["(s0 + 1)"] * 21),
    "(s0 + s1 + s2 + s3 + 1)**16",
    "1" * 400_000,
    "s0.real",
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_expressions_of_sizes_are_bounded(folder, limits, text):
    def plant(document):
        node(document, "x")["val"]["tensor"]["shape"][0] = text

    with pytest.raises(ArtifactError, match=r"graph.nodes.\d+.: .*(is no expression|too long)"):
        tfmq_fx.load(edited(folder, plant))


@pytest.mark.parametrize("depth", [120, 900, 100_000])
def test_nesting_is_bounded(folder, limits, depth):
    path = folder / GRAPH_FILE
    text = path.read_text()
    nested = f'"config":{"[" * depth}{"]" * depth},"config":'
    path.write_text(text.replace('"config":', nested, 1))
    with pytest.raises(ArtifactError, match=r"nested deeper than 128|given twice"):
        tfmq_fx.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"config":1,"config":', "the key 'config' is given twice"),
        ('"x":NaN,"config":', "NaN is not JSON"),
        ('"x":1e999,"config":', "the number 1e999 is out of range"),
        (f'"x":{"9" * 5000},"config":', "the number 9+ is out of range"),
    ],
)
def test_json_of_more_than_one_meaning_is_refused(folder, text, message):
    path = folder / GRAPH_FILE
    path.write_text(path.read_text().replace('"config":', text, 1))
    with pytest.raises(ArtifactError, match=message):
        tfmq_fx.load(folder)


# ---------------------------------------------------------------- what is loaded


def test_tensors_that_no_file_fills_are_an_error(bases, tmp_path):
    shutil.copytree(bases("w4a8"), tmp_path / "model")

    def plant(document):
        document["graph"]["tensors"]["conv_mid.codes"]["persistent"] = False

    with pytest.raises(ArtifactError, match=r"graph.tensors.conv_mid.codes: "):
        tfmq_fx.load(edited(tmp_path / "model", plant))


WRITES = [
    ("inplace_", lambda x, y: [x, "zero_"]),
    ("torch.relu_", lambda x, y: [x]),
    ("torch.ops.aten.copy_.default", lambda x, y: [x, 0.5]),
    ("torch.nn.functional.embedding", lambda x, y: [{"node": "t"}, y, None, 1e-3]),
    ("torch.nn.functional.instance_norm", lambda x, y: [x, None, None, None, None, True]),
]


@pytest.mark.parametrize(("target", "args"), WRITES, ids=[target for target, _ in WRITES])
def test_a_loaded_graph_does_not_write_to_what_it_is_given(folder, target, args):
    def plant(document):
        call = node(document, "torch.nn.functional.silu")
        nodes = {n["target"]: {"node": n["name"]} for n in document["graph"]["nodes"]}
        call.update(op="call_function", target=target, kwargs={}, args=args(nodes["x"], nodes["y"]))

    model = tfmq_fx.load(edited(folder, plant))
    assert model.call.copied
    given = [value.clone() for value in INPUTS]
    with contextlib.suppress(Exception):  # the shapes that follow may not fit
        model(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, INPUTS, strict=True))


@pytest.mark.parametrize("name", ["folded", "channels last", "w4a8", "bound"])
def test_loaded_models_answer_the_same_bits(bases, tmp_path, name):
    model = tfmq_fx.load(bases(name))
    tfmq_fx.save(model, tmp_path / "again")
    assert torch.equal(call(tfmq_fx.load(tmp_path / "again")), call(model))


def test_a_pickled_model_has_every_tensor(bases):
    model = tfmq_fx.load(bases("channels last"))
    names = [n.target for n in model.gm.graph.nodes if n.op == "get_attr"]
    model.gm.register_buffer(names[0], getattr(model.gm, names[0]), persistent=False)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(call(again), call(model))
    assert not any(value.is_meta for value in again.tensors())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_few_mutations_are_refused_or_consistent(bases, capfd, seed):
    found = mutations.in_child(bases("w4a8"), 20, seed)
    assert all(not kind.split()[0].isupper() for kind in found), capfd.readouterr().out
    assert sum(found.values()) == 20


@pytest.mark.slow
@pytest.mark.sample
def test_a_thousand_mutations_are_refused_or_consistent(capfd):
    found: Counter[str] = mutations.main(1000)
    assert all(not kind.split()[0].isupper() for kind in found), capfd.readouterr().out
    assert sum(found.values()) == 1000


class Positions(torch.nn.Module):
    """Writes through `.data` into a tensor of its own, as position embeddings in diffusers do."""

    def __init__(self):
        super().__init__()
        self.lin, self.t = torch.nn.Linear(8, 8), torch.nn.Linear(1, 8)

    def forward(self, x, timestep):
        places = x.new_zeros(1, x.shape[1], 8)
        places.data[:, 2:].copy_(torch.ones(1, x.shape[1] - 2, 8))
        return self.lin(x + places) + self.t(timestep[:, None].float())[:, None]


def test_writes_through_data_are_saved(tmp_path):
    example = {"x": torch.randn(2, 6, 8), "timestep": torch.tensor([5, 5])}
    model = tfmq_fx.fold_timesteps(Positions().eval(), [1, 5], example)
    tfmq_fx.save(model, tmp_path / "model")
    again = tfmq_fx.load(tmp_path / "model")
    assert torch.equal(again(**example), model(**example))
