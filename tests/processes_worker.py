"""What tests/test_processes.py runs in each of several processes: each check by its name.

    python -m tests.processes_worker RENDEZVOUS WORLD RANK FOLDER CHECK...

Every check compares what the processes found together with what one finds `alone`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import statistics
import sys
import traceback
from pathlib import Path

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler

from tests.test_traps import recipe
from tests.toys import ToyUNet, seeded, tiny_unet2d
from tfmq_fx import CalibrationError, ConfigError, api, calibrate, convert, prepare, save
from tfmq_fx.calibration.observers import RangeObserver, SampleCache
from tfmq_fx.calibration.scheduler_sampling import sample
from tfmq_fx.capture.capture import capture
from tfmq_fx.core import distributed
from tfmq_fx.core.presets import resolve
from tfmq_fx.passes import round_weights
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import sqnr

round_module = sys.modules[round_weights.__name__]

SIZE, STEPS = 8, 4
SHAPE = (3, SIZE, SIZE)


@functools.cache
def toy():
    return seeded(ToyUNet).eval()


@functools.cache
def captured():
    """The toy as a graph, once for all that is prepared here: that takes longest."""
    example = {"x": torch.zeros(2, *SHAPE), "t": torch.tensor([0, 1])}
    return capture(toy(), example, timestep="t")


def ready(config="w4a8", **reconstruction):
    example = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "capture", lambda *_, **__: captured())
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
        with distributed.alone():
            one = driven(ready(cache=room))
        same_calibration(many, one)
        driven(many, seed=1)
        with distributed.alone():
            driven(one, seed=1)
        same_calibration(many, one)
        assert len(one.cache) in (14 * STEPS, 2 * 14 * STEPS) or room < 1 << 20


def by_pipeline(folder):
    """Noise is drawn at every step, from the generator of the batch."""
    unet = tiny_unet2d(sample_size=SIZE, block_out_channels=(8, 16), norm_num_groups=4)
    for name, count in (("DDPM", 7), ("DDIM", 2)):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        many, seen = by_pipe(getattr(diffusers, f"{name}Pipeline")(unet, scheduler), unet, count)
        with distributed.alone():
            pipe = getattr(diffusers, f"{name}Pipeline")(unet, scheduler)
            one, all_seen = by_pipe(pipe, unet, count)
        same_calibration(many, one)
        assert sum(distributed.exchange(len(seen), "calls")) == len(all_seen) == 3 * -(-count // 2)


def by_pipe(pipe, unet, count):
    """A calibrated model, and the calls of its graph."""
    prepared = prepare(unet, config=recipe("w4a8"))
    with counting(prepared) as seen:
        calibrate(
            prepared, pipe, samples=count, batch_size=2, num_inference_steps=3, progress=False
        )
    return prepared, seen


@contextlib.contextmanager
def counting(prepared):
    """The calls of the observed graph."""
    seen = []
    handle = prepared.observed.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def by_inputs(folder):
    many = calibrate(ready(), calls(), progress=False)
    with distributed.alone():
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
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "files", "sha256")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def second_order(folder):
    """Ranges, samples, every part of the model and every byte it is saved as."""
    many = convert(driven(ready()), progress=False)
    save(many, folder / "many", calibration=True)
    assert (folder / "many").exists()  # in every process, as soon as save() is over
    with distributed.alone():
        one = convert(driven(ready()), progress=False)
        save(one, folder / f"alone-{dist.get_rank()}", calibration=True)
    same_model(many, one)
    assert files(folder / "many") == files(folder / f"alone-{dist.get_rank()}")


def recipes(folder):
    """Profiles, rewrites, attention's products and a budget: what the processes do not share."""
    for name, budget in (("best-w4a8", None), ("tcaq-w4a6", None), ("w4a8", "0.2x")):
        config = resolve(name)
        spec = dataclasses.replace(config.reconstruction, iters=0, rounds=0, samples=12)
        temporal = dataclasses.replace(config.temporal, tiar_iters=5)
        config = dataclasses.replace(config, reconstruction=spec, temporal=temporal)
        example = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
        prepared = driven(prepare(toy(), example, config=config))
        many = convert(prepared, budget=budget, progress=False)
        with distributed.alone():
            same_model(many, convert(prepared, budget=budget, progress=False))


def blocks(folder):
    """Learnt blocks: the same in both processes, and near to what one learns."""
    # chunks of 5, 5, 5 and 1, so that of the last one process has none
    config = {"rounding": "nearest", "iters": 20, "batch_size": 5, "samples": 16}
    many = convert(driven(ready(**config)), progress=False)
    with distributed.alone():
        one = convert(driven(ready(**config)), progress=False)
    both = distributed.exchange(many.state_dict(), "models")
    assert all(torch.equal(value, both[0][name]) for name, value in both[1].items())
    left, right = (learnt_errors(model) for model in (many, one))
    assert left.keys() == right.keys()
    differing = [
        (layer.weight_codes() != one.gm.get_submodule(name).weight_codes()).double().mean().item()
        for name, layer in many.gm.named_modules()
        if isinstance(layer, QuantLayer)
    ]
    # Adam's first steps are as long for a gradient that is next to nothing as for any other: where
    # a processor adds in another order for another number of rows, that order decides some codes,
    # and those change what all later blocks learn on (up to 4 % of the codes of the last layers).
    # Before them nearly all codes are the same.
    assert statistics.median(differing) < 1e-3 and max(differing) < 0.05
    # Errors are squares, relative to the targets', so that their roots are apart by no more than
    # the outputs of both blocks are. Without another code these are apart by what the order of
    # sums does to the biases: 100 dB, as at the model's output below. Each other code, of weights
    # or of inputs, is a whole step, of which the square is 12 times what rounding is off by in
    # the mean. Sums move inputs by 2**-22 of their range at most, which has 255 boundaries.
    flipped = max(*differing, 255 * 2**-21)
    for block, errors in left.items():
        for kind, error in errors.items():
            root = math.sqrt(right[block][kind])
            apart = 1e-5 + root * math.sqrt(12 * flipped)
            assert math.sqrt(error) == pytest.approx(root, rel=0, abs=apart), (block, kind)
    x = torch.randn(STEPS, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = one.timesteps
    with torch.no_grad():
        # that share of a layer's codes is so far below what rounding is off by; layers add up
        below = min(20, -10 * math.log10(12 * flipped))
        assert sqnr(one(x, t), many(x, t)) > sqnr(toy()(x, t), one(x, t)) + below
        assert sqnr(toy()(x, t), many(x, t)) < 20


def learnt_errors(model):
    passes = {p["name"]: p["details"] for p in model.record["passes"]}
    errors = passes["reconstruct_blocks"]["error"]
    assert any(e["after"] < 0.9 * e["before"] for e in errors.values())
    return errors


def rounds_and_correction(folder):
    """Sampling again with the quantized model, and the error of its output."""
    config = ready("w4a8", rounds=1, round_iters=1)
    config.recipe = dataclasses.replace(config.recipe, correction="noise")
    driven(config, samples=5)
    many = convert(config, progress=False)
    with distributed.alone():
        one = convert(config, progress=False)
    left, right = (
        next(p for p in m.record["passes"] if p["name"] == "correct_outputs") for m in (many, one)
    )
    assert timeless(left) == timeless(right)


def images(folder):
    """Images, in the order of one process."""
    denoiser, seen = toy(), []

    def spied(x, t, scale):
        seen.append(len(x))
        return denoiser(x, t.expand(len(x))) * scale

    settings = {"num_inference_steps": 3, "batch_size": 2}
    settings["conditions"] = {"scale": torch.arange(1.0, 8.0)[:, None, None, None]}

    def drawn(**options):
        return sample(spied, DDIMScheduler(), (7, *SHAPE), **settings, **options)

    many = drawn(parallel=True)
    assert seen == [[2, 2, 2, 2, 2, 2], [2, 2, 2, 1, 1, 1]][dist.get_rank()]
    assert torch.equal(many, drawn())  # as each process does for itself, unless asked


def exchanged(folder):
    """What processes hand to each other, and who takes what."""
    place = dist.get_rank()
    assert (distributed.rank(), distributed.world(), list(distributed.shard_indices(5))) == (
        place,
        2,
        [[0, 2, 4], [1, 3]][place],
    )
    value = {"x": torch.full((2, 3, 4, 5), float(place)).to(memory_format=torch.channels_last)}
    first, second = distributed.exchange(value, "values")
    assert torch.equal(second["x"], torch.ones(2, 3, 4, 5))
    assert first["x"].stride() == second["x"].stride() == value["x"].stride()
    assert distributed.exchange(place or None, "some") == [None, 1]
    assert distributed.from_first(place + 7, "first") == 7
    assert (
        distributed.gather_to_first((place, torch.tensor(place)), "all")
        == [(0, 0), (1, 1)][: 2 - 2 * place]
    )
    assert distributed.all_reduce_sum(torch.tensor([1.0, place]), "sum").tolist() == [2, 1]
    squares = distributed.in_order(iter(range(5)), lambda i: (i * i, place), "squares")
    assert list(squares) == [(0, 0), (1, 1), (4, 0), (9, 1), (16, 0)]
    assert distributed.interleaved([place] * (3 - place), 5, "items") == [0, 1, 0, 1, 0]
    rounds = []
    assert list(distributed.shard("abc", lambda: rounds.append(1))) == [["a", "c"], ["b"]][place]
    assert len(rounds) == 2
    with distributed.alone():
        assert (distributed.rank(), distributed.world()) == (0, 1)
        assert (
            distributed.exchange(place, "own")
            == distributed.gather_to_first(place, "own")
            == [place]
        )


def failures(folder):
    """An error of one is an error of all, at once, and they go on together afterwards."""
    place = dist.get_rank()

    def spoilt():
        for i, (x, t) in enumerate(calls()):
            yield (x * math.nan if i == 3 else x), t  # the second process meets it

    prepared = ready()
    with pytest.raises(CalibrationError, match="NaN or Inf") as caught:
        calibrate(prepared, spoilt(), progress=False)
    notes = getattr(caught.value, "__notes__", [])
    assert notes == [["raised in process 1 of 2"], []][place]
    assert type(prepared.cache) is SampleCache
    driven(prepared)  # and the model is as usable as it was
    for failing in (0, 1):
        with pytest.raises(OSError, match="no space"), distributed.together("a test"):
            if place == failing:
                raise OSError("no space")
            for i in range(9):
                distributed.exchange(i, f"turn {i}")
    with pytest.raises(RuntimeError, match="Odd"), distributed.together("a test"):
        if place == 1:
            raise Odd(lambda: None, 3)  # which cannot be pickled
    with pytest.raises(ValueError, match="0"), distributed.together("a test"):
        raise ValueError(str(place))  # both fail: the first one's error counts
    # a layer whose rounding fails where the first process alone works
    prepared = ready()
    driven(prepared)
    with pytest.MonkeyPatch.context() as patch:
        if place == 0:
            patch.setattr(round_module, "round_layer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(prepared, progress=False)
    convert(prepared, progress=False)


class Odd(RuntimeError):
    def __init__(self, function, number):
        super().__init__("Odd")
        self.function = function


def disagreement(folder):
    """Arguments that differ are named, and processes that go different ways say where they are."""
    place = dist.get_rank()
    with pytest.raises(ConfigError, match="seed: 0 and 1"):
        driven(ready(), seed=place)
    with pytest.raises(ConfigError, match=r"recipe\.reconstruction\.damping"):
        driven(ready(damping=0.1 * (1 + place)))
    with pytest.raises(ConfigError, match=r"source\.1\.1: 8 and 9"):
        source = DDIMScheduler(), (3, 8 + place, 8 + place)
        calibrate(ready(), source, progress=False)
    with pytest.raises(ConfigError, match="process 1 is at the end of calibrate"):
        calibrate(ready(), calls(4 - 2 * place), progress=False)
    prepared = ready()
    for call in calls(2 + place):
        prepared(*call)  # each for itself
    with pytest.raises(ConfigError, match="calibration: "):
        convert(prepared, progress=False)
    with pytest.raises(ConfigError, match=r"process 0 is at calibrate.*process 1 is at sample"):
        if place:
            sample(toy(), DDIMScheduler(), (2, *SHAPE), num_inference_steps=2, parallel=True)
        else:
            driven(ready())


def evaluated(folder):
    """Each process computes its own results, and the table has all of them."""
    from tests.subjects import tiny_subject
    from tfmq_fx.evaluation.evaluate import evaluate

    said = []
    usual = {"samples": 16, "seeds": [0, 1], "steps": 2, "batch": 8, "backend": "eager"}
    rows = evaluate(
        [tiny_subject()],
        ["nearest"],
        ["w4a8"],
        out=folder / "shared",
        progress=False,
        say=said.append,
        **usual,
    )
    assert len(said) == 2  # two of the four each
    assert [set(row.results) for row in rows] == [{0, 1}, {0, 1}]
    assert all(result["status"] == "done" for row in rows for result in row.results.values())
    assert (folder / "shared" / "table.md").exists()


def checkpoints(folder):
    """What two processes finished one of them takes, and the other way round."""
    place, made = dist.get_rank(), []
    original = round_module.input_statistics

    def counted(site, *args):
        made.append(site.name)
        return original(site, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_module, "input_statistics", counted)
        prepared = driven(ready())
        many = convert(prepared, checkpoint=folder / "many", progress=False)
        assert made
        made.clear()
        with distributed.alone():
            if place == 0:
                one = convert(prepared, checkpoint=folder / "many", progress=False)
                same_model(many, one)
                half = convert(prepared, checkpoint=folder / "one", progress=False)
                same_model(many, half)
                for path in sorted((folder / "one").glob("round_weights*"))[::2]:
                    path.unlink()
        distributed.exchange(None, "written")
        total, found = len(list((folder / "many").iterdir())), len(list((folder / "one").iterdir()))
        made.clear()
        again = convert(prepared, checkpoint=folder / "one", progress=False)
        same_model(many, again)
        assert len(made) == total - found > 2
        assert len(list((folder / "one").iterdir())) == total
        taken = [p["details"].get("checkpoint", {}).get("taken") for p in again.record["passes"]]
        assert distributed.exchange(taken, "taken") == [taken, taken]
        with pytest.raises(ConfigError, match="another conversion"):
            convert(driven(ready(), seed=1), checkpoint=folder / "one", progress=False)


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
