"""Damaged and hostile copies of saved models, and what becomes of loading them.

`python -m tests.mutations 1000` tries as many on every model of `MODELS` together and counts.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import tfmq_fx
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.serialization.artifact import GRAPH_FILE, ORIGIN_FILE, ORIGIN_TENSORS, TENSORS_FILE

TIMESTEPS = [0, 250, 500, 999]
SECONDS, BYTES = 20, 1 << 31  # that refusing or loading one small folder may take


class Net(nn.Module):
    """A denoiser small enough to be loaded a thousand times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time1, self.time2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.conv_in, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv_mid, self.conv_out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Any, t: Any, y: Any) -> Any:
        angles = t[:, None].float() * torch.exp(-torch.arange(4, device=x.device) * 1.0)
        e = self.time2(nn.functional.silu(self.time1(torch.cat([angles.sin(), angles.cos()], 1))))
        h = self.conv_in(x) + (e + y)[:, :, None, None]
        if x.shape[0] * x.shape[2] > 1 << 20:
            h = h * 2
        h[:, :1] *= 2
        return {"sample": self.conv_out(self.conv_mid(nn.functional.silu(self.norm(h)))), "n": 1}


INPUTS = (torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.randn(2, 8))


def quantized(folder: Path, *, calibration: bool = False, bind: bool = False) -> None:
    """Save the network at W4A8."""
    made = tfmq_fx.prepare(Net().eval(), INPUTS, timesteps=TIMESTEPS, config="w4a8")
    with torch.no_grad():
        for t in TIMESTEPS:
            made(torch.randn(2, 3, 8, 8), torch.tensor(t), INPUTS[2])
    model = tfmq_fx.convert(made, progress=False)
    tfmq_fx.save(tfmq_fx.bind_request(model) if bind else model, folder, calibration=calibration)


def folded(folder: Path, layout: Any = torch.contiguous_format) -> None:
    """Save the network in floating point, its tables exact."""
    net = Net().eval().to(memory_format=layout)
    tfmq_fx.save(tfmq_fx.fold_timesteps(net, TIMESTEPS, INPUTS), folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "w4a8": quantized,
    "bound": lambda folder: quantized(folder, bind=True),
    "calibrated": lambda folder: quantized(folder, calibration=True),
    "folded": folded,
    "channels last": lambda folder: folded(folder, torch.channels_last),
}


def call(model: Any) -> torch.Tensor:
    """The model's answer to a fixed question."""
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    with torch.no_grad():
        return model(x, torch.tensor([250]), torch.linspace(-1, 1, 8)[None])["sample"]  # type: ignore[no-any-return]


# ---------------------------------------------------------------- changes

_VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        16,
        1 << 31,
        1 << 62,
        -(1 << 63),
        0.5,
        1e300,
        "",
        "x",
        "s0",
    ),
    *("batch", "(" * 60, "-" * 5000 + "1", "9**9**9", "float64", "load", "os:system", "../../x"),
    *(
        "__class__",
        "torch.ops.aten.resize_.default",
        "cuda:0",
        "aten",
        "\0",
        "é",
        [],
        {},
        [[]],
        [{}],
    ),
    *(
        {"node": "x"},
        {"symbol": "s0"},
        {"tuple": []},
        {"float": "nan"},
        {"$float": "abc"},
        {"a": 1},
    ),
    *(
        [1] * 40,
        [1 << 40] * 4,
        {"leaf": 0},
        {"const": None},
        {"dtype": "half"},
        {"stage": "lowered"},
    ),
    *(
        {"tensor": {"shape": [1 << 40], "dtype": "float32", "device": "cpu"}},
        {"layout": "sparse_coo"},
    ),
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found, todo = [], [value]
    while todo:
        each = todo.pop()
        keys: Any = each if isinstance(each, dict) else range(len(each))
        for key in keys:
            found.append((each, key))
            if isinstance(each[key], (dict, list)):
                todo.append(each[key])
    return found


def change(document: Any, rng: random.Random) -> str:
    """Change one thing in a JSON document, in place; in words."""
    places = _places(document)
    place, key = rng.choice(places)
    old, kind = place[key], rng.randrange(8)
    if kind == 0:
        del place[key]
        return f"without {key!r}"
    if kind == 1 and isinstance(place, dict):
        place[rng.choice(["x", "out", "inplace", "class", "stride", key + "_"])] = place.pop(key)
        return f"{key!r} renamed"
    if kind == 2:
        other, name = rng.choice(places)
        place[key] = copy.deepcopy(other[name])
        return f"{key!r} = what is at {name!r}"
    if kind == 3 and isinstance(old, list) and old:
        rng.choice([old.reverse, lambda: old.append(old[0]), old.pop])()
        return f"list {key!r}"
    if kind == 4 and type(old) in (int, float):
        place[key] = rng.choice(
            [old + 1, old - 1, -old, old * 2, old * 1000000, str(old), float(old)]
        )
        return f"{key!r}: {old!r} -> {place[key]!r}"
    if kind == 5 and type(old) is str:
        place[key] = rng.choice(
            [old + "_", old[::-1], old[:-1], old.upper(), old.replace(".", "_")]
        )
        return f"{key!r}: {old!r:.40} -> {place[key]!r:.40}"
    place[key] = copy.deepcopy(rng.choice(_VALUES))
    return f"{key!r}: {old!r:.40} -> {place[key]!r:.40}"


def seal(folder: Path, document: dict[str, Any]) -> None:
    """Write the JSON of a save with checksums that are right."""
    document = {k: v for k, v in document.items() if k != "sha256"}
    listed = [(document, "tensors", TENSORS_FILE)]
    if isinstance(document.get("origin"), dict):
        listed += [(document["origin"], name, name) for name in (ORIGIN_FILE, ORIGIN_TENSORS)]
    for place, key, name in listed:
        if key in place and isinstance(place[key], dict):
            content = (folder / name).read_bytes()
            place[key] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(document, separators=(",", ":")).removesuffix("}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / GRAPH_FILE).write_text(f'{text},"sha256":"{digest}"}}')


def mutate(folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Change a saved folder; what was done, and whether its checksums are right again."""
    files = sorted(path for path in folder.iterdir())
    kind = rng.randrange(10)
    if kind == 0:  # one byte of one file
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return f"bit of byte {at} of {path.name}", False
    if kind == 1:
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))])
        return f"{path.name} cut", False
    if kind == 2:
        path = folder / rng.choice([f.name for f in files if f.suffix == ".safetensors"])
        return _change_tensors(path, rng), _resealed(folder)
    if kind == 3 and (folder / ORIGIN_FILE).exists():
        data = json.loads((folder / ORIGIN_FILE).read_text())
        what = change(data, rng)
        if rng.random() < 0.3 and isinstance(data.get("graph"), str):
            graph = json.loads(data["graph"])
            what = f"captured graph: {change(graph, rng)}"
            data["graph"] = json.dumps(graph)
        (folder / ORIGIN_FILE).write_text(json.dumps(data))
        return f"origin: {what}", _resealed(folder)
    document = json.loads((folder / GRAPH_FILE).read_text())
    part = rng.choice([None, "call", "config", "extra", "graph", "graph"])
    done = [change(document[part] if part else document, rng) for _ in range(rng.choice([1, 1, 2]))]
    if kind == 4:
        (folder / GRAPH_FILE).write_text(json.dumps(document, separators=(",", ":")))
        return f"{part}: {done}, not sealed", False
    seal(folder, document)
    return f"{part}: {done}", True


def _resealed(folder: Path) -> bool:
    seal(folder, json.loads((folder / GRAPH_FILE).read_text()))
    return True


def _change_tensors(path: Path, rng: random.Random) -> str:
    tensors = {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
    if not tensors:
        return "nothing"
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    kind = rng.randrange(6)
    if kind == 1:
        tensors[name + "x"] = value
    elif kind == 2:
        tensors[name] = value.flatten()
    elif kind == 3:
        tensors[name] = value.to(
            rng.choice([torch.float64, torch.int8, torch.float16, torch.int64])
        )
    elif kind == 4:
        tensors[name] = torch.cat([value.flatten()] * 2)
    elif kind == 5:
        tensors[name] = torch.full_like(value, rng.choice([0, 1, 100]))
    safetensors.torch.save_file(tensors, path)
    return f"tensor {name}, kind {kind}"


# ---------------------------------------------------------------- outcomes


def outcome(folder: Path, wanted: torch.Tensor, sealed: bool) -> str:
    """What becomes of loading a changed folder, and of calling what was loaded."""
    try:
        model = tfmq_fx.load(folder)
    except ArtifactError as error:
        return "refused" if str(folder) in str(error) else f"UNNAMED {error}"
    except Exception as error:
        return f"FOREIGN {type(error).__name__}: {error}"
    if sealed:
        try:
            call(model)
        except Exception as error:
            return f"loaded, call: {type(error).__name__}"
        return "loaded"
    return "as it was" if torch.equal(call(model), wanted) else "SILENTLY DIFFERENT"


def trials(base: Path, count: int, seed: int, report: Callable[[str], None]) -> Counter[str]:
    """`count` changes of a saved model, each tried on a copy of its own."""
    wanted, found = call(tfmq_fx.load(base)), Counter[str]()
    for i in range(count):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            shutil.copytree(base, folder)
            what, sealed = mutate(folder, random.Random(f"{seed} {i}"))
            report(f"{i}: {what}")
            result = outcome(folder, wanted, sealed)
        found[result.split(":")[0]] += 1
        if result.split()[0].isupper():
            print(f"{base.name} {seed} {i}: {what} -> {result:.300}", flush=True)
    return found


def _child(base: Path, count: int, seed: int, pipe: int) -> None:
    """Trials under limits; the parent reads how far they came."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))

    def report(text: str) -> None:
        signal.alarm(SECONDS)
        os.write(pipe, f"{text}\n".encode())

    found = trials(base, count, seed, report)
    os.write(pipe, (json.dumps(found) + "\n").encode())


def in_child(base: Path, count: int, seed: int) -> Counter[str]:
    """Trials in a process of their own, which may crash or hang."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            _child(base, count, seed, writing)
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        lines = file.read().splitlines()
    _, status = os.waitpid(pid, 0)
    if lines and lines[-1].startswith("{"):
        return Counter(json.loads(lines[-1]))
    print(f"{base.name} seed {seed}: died ({status}) at {lines[-1:]}", flush=True)
    return Counter({"CRASH or hang" if status else "CRASH": 1})


def main(count: int, first: int = 0) -> Counter[str]:
    """Try `count` changes, dealt to all models, and print what became of them."""
    total, part = Counter[str](), 25
    with tempfile.TemporaryDirectory() as place:
        for name, make in MODELS.items():
            base = Path(place) / name.replace(" ", "-")
            make(base)
            for seed in range(first, first + count // len(MODELS) // part):
                total += in_child(base, part, seed)
            print(name, dict(total), flush=True)
    return total


if __name__ == "__main__":
    print(dict(main(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]))))
