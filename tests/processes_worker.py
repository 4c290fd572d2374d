"""What tests/test_processes.py runs in each of several processes: each check by its name.

    python -m tests.processes_worker RENDEZVOUS WORLD RANK FOLDER CHECK...

Every check compares what the processes found together with what one finds `alone`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DDIMScheduler

from tests.test_traps import recipe
from tests.toys import ToyUNet, seeded
from tfmq_fx import calibrate, convert, prepare, processes, save
from tfmq_fx.metrics import sqnr
from tfmq_fx.observers import RangeObserver

SIZE, STEPS = 8, 4
SHAPE = (3, SIZE, SIZE)


def toy():
    return seeded(ToyUNet).eval()


def ready(config="w4a8", **reconstruction):
    example = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
    return prepare(toy(), example, config=recipe(config, mode="tib", **reconstruction))


def driven(prepared, **options):
    """Calibrated by a scheduler: five batches, the last of them smaller."""
    settings = {"samples": 14, "batch_size": 3, "num_inference_steps": STEPS} | options
    return calibrate(prepared, (DDIMScheduler(), SHAPE), progress=False, **settings)


def calls(count=5):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        yield torch.randn(2 + i, *SHAPE, generator=generator), torch.arange(2 + i) % 3


def saw(prepared):
    """All that calibration recorded, in its order."""
    observers = [m for m in prepared.observed.modules() if isinstance(m, RangeObserver)]
    assert observers and type(prepared.cache).__name__ == "SampleCache"
    return [list(o.seen.items()) for o in observers], list(prepared.cache.visits.items())


def same_calibration(a, b):
    assert saw(a) == saw(b)
    rows = [prepared.cache.rows for prepared in (a, b)]
    assert list(rows[0]) == list(rows[1])
    for step, samples in rows[0].items():
        assert len(samples) == len(rows[1][step])
        for left, right in zip(samples, rows[1][step], strict=True):
            for x, y in zip(left, right, strict=True):
                assert torch.equal(x, y) and x.stride() == y.stride()


def by_scheduler(folder):
    # room for few samples, so that the cache has to choose
    for room in (1 << 30, 7 * (3 * SIZE * SIZE * 4 + 8)):
        many = driven(ready(cache=room))
        with processes.alone():
            one = driven(ready(cache=room))
        same_calibration(many, one)
        driven(many, seed=1)
        with processes.alone():
            driven(one, seed=1)
        same_calibration(many, one)
        assert len(one.cache) in (14 * STEPS, 2 * 14 * STEPS) or room < 1 << 20


def by_inputs(folder):
    many = calibrate(ready(), calls(), progress=False)
    with processes.alone():
        one = calibrate(ready(), calls(), progress=False)
    same_calibration(many, one)


def same_model(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def files(folder):
    """Every file by its name, as bytes; of JSON all but the seconds that things took."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: timeless(json.loads(path.read_text()))
        if path.suffix == ".json"
        else path.read_bytes()
        for name, path in found.items()
    }


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "files")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def second_order(folder):
    """Ranges, samples, every part of the model and every byte it is saved as."""
    many = convert(driven(ready()), progress=False)
    save(many, folder / "many", calibration=True)
    assert (folder / "many").exists()  # in every process, as soon as save() is over
    with processes.alone():
        one = convert(driven(ready()), progress=False)
        save(one, folder / f"alone-{dist.get_rank()}", calibration=True)
    same_model(many, one)
    assert files(folder / "many") == files(folder / f"alone-{dist.get_rank()}")


def blocks(folder):
    """Learnt blocks: the same in both processes, and near to what one learns."""
    # chunks of 5, 5, 5 and 1, so that of the last one process has none
    config = {"rounding": "nearest", "iters": 20, "batch_size": 5, "samples": 16}
    many = convert(driven(ready(**config)), progress=False)
    with processes.alone():
        one = convert(driven(ready(**config)), progress=False)
    both = processes.exchange(many.state_dict(), "models")
    assert all(torch.equal(value, both[0][name]) for name, value in both[1].items())
    passes = [next(p for p in m.record["passes"] if "blocks" in p["name"]) for m in (many, one)]
    for block, errors in passes[0]["details"]["error"].items():
        found = passes[1]["details"]["error"][block]
        print(block, errors, found)
    x, t = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 250, 500, 750])
    with torch.no_grad():
        print(sqnr(one(x, t), many(x, t)), sqnr(toy()(x, t), many(x, t)), sqnr(toy()(x, t), one(x, t)))
    codes = {n: v for n, v in one.state_dict().items() if n.endswith("codes")}
    print({n: float((many.state_dict()[n] != v).float().mean()) for n, v in codes.items()})


def main():
    rendezvous, world, rank, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", world_size=int(world), rank=int(rank)
    )
    results = {}
    for name in names:
        own = Path(folder, name)
        own.mkdir(exist_ok=True)
        try:
            globals()[name](own)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        Path(folder, f"results-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
