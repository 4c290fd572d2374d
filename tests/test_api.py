"""api: prepare, calibrate, convert, save and load, end to end, and what bad arguments are told."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.toys import ToyUNet, seeded, tiny_unet2d
from tfmq_fx import (
    PRESETS,
    ActivationSpec,
    ArtifactError,
    BackendError,
    CalibrationError,
    Config,
    ConfigError,
    InputError,
    LayerConfig,
    ReconstructionSpec,
    TemporalSpec,
    WeightSpec,
    calibrate,
    compile,
    convert,
    fold_timesteps,
    load,
    prepare,
    report,
    save,
)
from tfmq_fx.quant.feature_selection import TABLE, TIB
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import sqnr
from tfmq_fx.serialization import artifact

TIMES = (0, 250, 999)
NAMES = ("fp", "w8a8", "w4a8", "w8a16", "w4a16")


def fast(name, **temporal):
    """A preset with a few steps of learning."""
    recipe = PRESETS[name]
    spec = dataclasses.replace(recipe.temporal, **{"tiar_iters": 5, **temporal})
    return dataclasses.replace(recipe, temporal=spec)


def data(size, count=4, times=TIMES, seed=0):
    """One batch for each timestep."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return [(torch.randn(shape, generator=generator), torch.full((count,), t)) for t in times]


def calibrated(model, size, config, **options):
    example = None if hasattr(model, "config") else data(size)[0]
    prepared = prepare(model, example, timesteps=TIMES, config=config, **options)
    return calibrate(prepared, data(size), progress=False)


def converted(model, size, config, **options):
    return convert(calibrated(model, size, config, **options), progress=False)


def snapshot(model):
    """Everything about a model that a user could see change."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "identity": {n: (id(t), t.data_ptr(), t._version) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "grad": {n: (t.requires_grad, t.grad is None) for n, t in tensors.items()},
        "modules": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "forward": [m.__dict__.get("forward") for m in model.modules()],
    }


def same(before, after):
    values, others = before.pop("values"), after.pop("values")
    equal = all(torch.equal(others[n], v) for n, v in values.items())
    return equal and before == after


@pytest.fixture(scope="module")
def toy():
    return seeded(ToyUNet).eval()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet2d()


@pytest.fixture(scope="module")
def toys(toy):
    return {name: converted(toy, 8, fast(name)) for name in NAMES}


@pytest.fixture(scope="module")
def unets(unet):
    return {name: converted(unet, 16, fast(name)) for name in NAMES}


@pytest.fixture(scope="module")
def prepared(toy):
    return calibrated(toy, 8, fast("w8a8"))


def answer(output):
    return getattr(output, "sample", output)


# ---------------------------------------------------------------- the way through

# Output SQNR in dB at least, on the calibration data (other data is clipped to the range of the
# four samples of a step). Rounding x to 2**b steps over 2 r gives 6.02 b + 4.77 - 20 log10(r / rms)
# dB, 42 at 8 bits and 18 at 4 where r is 3.5 rms; 16 layers in a row, each adding as much noise to
# a residual stream, lose at most 10 log10(16) = 12 of it: 30 and 6.
LEAST = {"fp": 100, "w8a8": 30, "w4a8": 6, "w8a16": 30, "w4a16": 6}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["toys", "unets"])
def test_every_preset_gives_a_model_that_answers_like_the_original(kind, name, request):
    model = request.getfixturevalue({"toys": "toy", "unets": "unet"}[kind])
    found = request.getfixturevalue(kind)[name]
    size = {"toys": 8, "unets": 16}[kind]
    with torch.no_grad():
        for x, t in data(size):
            expected = answer(model(x, t))
            output = answer(found(x, t))
            assert output.shape == expected.shape and output.dtype == expected.dtype
            assert sqnr(expected, output) > LEAST[name]


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_weight_of_a_unet_is_an_integer(toys, unets, name):
    for models in (toys, unets):
        facts = report(models[name])
        assert facts.weight_coverage == 1.0
        assert facts.activation_coverage == (1.0 if name.endswith("a8") else 0.0)
        assert facts.data["declined"] == []


@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
def test_ends_have_eight_bit_weights_and_the_sample_sixteen(toys, unets, name):
    for models in (toys, unets):
        first, last = models[name].gm.conv_in, models[name].gm.conv_out
        assert (first.weight_bits, first.act_bits) == (8, 16)
        assert (last.weight_bits, last.act_bits) == (8, 8)


# fp8 rounds to a fraction: 3 bits of mantissa leave 31.6 dB of what is uniform between powers of
# two; weights and inputs of 16 layers in a row lose at most 10 log10(2 * 16) = 15 of it. Symmetric
# 8-bit ranges waste half of their codes, 6 dB, on inputs of one sign.
FORMATS = {"fp8": 16, "w8a8-dynamic": 24, "fp8-dynamic": 16}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_go_all_the_way_through(toy, name, tmp_path):
    prepared = prepare(toy, data(8)[0], timesteps=TIMES, config=fast(name))
    if not name.endswith("dynamic"):  # which need no calibration
        calibrate(prepared, data(8), progress=False)
    found = convert(prepared, progress=False)
    save(found, tmp_path / "model")
    loaded = load(tmp_path / "model")
    with torch.no_grad():
        for x, t in data(8):
            assert sqnr(answer(toy(x, t)), answer(found(x, t))) > FORMATS[name]
            assert torch.equal(answer(loaded(x, t)), answer(found(x, t)))
    for ours, theirs in zip(found.gm.modules(), loaded.gm.modules(), strict=True):
        if isinstance(ours, QuantLayer):
            assert theirs.spec() == ours.spec()
            assert theirs.weight_codes().dtype == ours.weight_codes().dtype
    facts = report(found)
    assert facts.weight_coverage == facts.activation_coverage == 1.0
    number = "fp8 / fp8" if name.startswith("fp8") else "8 / 8"
    kind = "dynamic" if name.endswith("dynamic") else "per timestep"
    assert f"mid1.conv1: QuantConv2d {number} / {kind} / " in str(facts)
    assert "100.0 % of layer inputs are quantized" in str(facts)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
def test_the_users_model_is_never_changed(mode, tmp_path):
    model = seeded(ToyUNet).train(mode)
    model.conv_in.weight.requires_grad_(False)
    model.down1.register_forward_hook(lambda module, args, output: None)
    before = snapshot(model)
    random = torch.get_rng_state()
    done = converted(model, 8, fast("w4a8"))
    save(done, tmp_path / "model")
    done.half()
    fold_timesteps(model, TIMES, data(8)[0])(*data(8)[0])
    assert same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())


def test_quantized_layers_share_no_memory_with_the_original(toy, toys):
    own = {t.untyped_storage().data_ptr() for t in (*toy.parameters(), *toy.buffers())}
    for name in NAMES[1:]:
        layers = [m for m in toys[name].gm.modules() if isinstance(m, QuantLayer)]
        theirs = {b.untyped_storage().data_ptr() for m in layers for b in m.buffers()}
        assert len(layers) == 21 and not own & theirs, name


def test_casting_a_folded_model_leaves_the_original(toy):
    before = snapshot(toy)
    folded = fold_timesteps(toy, TIMES, data(8)[0])
    assert folded.half().gm.conv_in.weight.dtype == torch.float16
    folded.bfloat16().float()
    assert toy.conv_in.weight.dtype == torch.float32
    assert same(before, snapshot(toy))


def test_prepared_answers_exactly_like_the_original(unet, prepared, toy):
    wrapped = prepare(unet, config=fast("w8a8"))
    with torch.no_grad():
        for x, t in data(16, seed=2):
            expected, found = unet(x, t), wrapped(x, t)
            assert type(found) is type(expected)
            assert torch.equal(found.sample, expected.sample)
            assert torch.equal(wrapped(x, t, return_dict=False)[0], expected.sample)
            assert torch.equal(wrapped(sample=x, timestep=t[0]).sample, expected.sample)
        small = prepare(toy, data(8)[0])
        for x, t in data(8, seed=2):
            assert torch.equal(small(x, t), toy(x, t))
    assert wrapped.config is unet.config and wrapped.dtype == torch.float32
    assert wrapped.device == torch.device("cpu") and wrapped.source is unet


def test_return_dict_and_the_forms_of_a_timestep(unets):
    model = unets["w8a8"]
    x, t = data(16)[1]
    with torch.no_grad():
        expected = model(x, t).sample
        assert type(model(x, t)).__name__ == "UNet2DOutput"
        assert isinstance(model(x, t, return_dict=False), tuple)
        assert torch.equal(model(x, t, return_dict=False)[0], expected)
        for form in (250, 250.0, torch.tensor(250), torch.tensor([250]), t.to(torch.int32)):
            assert torch.equal(model(x, form).sample, expected), form
        assert torch.equal(model(timestep=250, sample=x).sample, expected)


def test_timesteps_may_differ_within_a_batch(toys):
    model, x = toys["fp"], torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mixed = model(x, torch.tensor([999, 0, 250]))
        for i, t in enumerate((999, 0, 250)):  # alone: other kernels, float reassociation
            torch.testing.assert_close(model(x[i : i + 1], t)[0], mixed[i], rtol=1e-5, atol=1e-5)


def test_two_conversions_are_bit_identical(toy, toys):
    again = converted(toy, 8, fast("w4a8"))
    state = toys["w4a8"].state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    x, t = data(8)[0]
    assert torch.equal(again(x, t), toys["w4a8"](x, t))


def test_converting_twice_from_one_prepared_model(prepared):
    first, second = (convert(prepared, progress=False) for _ in range(2))
    state = first.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in second.state_dict().items())


# ---------------------------------------------------------------- where calibration data comes from


def pipelines():
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    return {"ddpm": (DDPMPipeline, DDPMScheduler), "ddim": (DDIMPipeline, DDIMScheduler)}


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_calibration_by_a_pipeline_visits_the_steps_of_its_scheduler(unet, kind):
    pipeline, scheduler = pipelines()[kind]
    pipe = pipeline(unet, scheduler())
    prepared = prepare(unet, config=fast("w8a8"))
    sizes = set()
    hook = prepared.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    calibrate(prepared, pipe, num_inference_steps=3, samples=3, batch_size=2, progress=False)
    hook.remove()
    assert sizes == {2, 1}
    assert pipe.unet is unet
    assert prepared.timesteps is None
    done = convert(prepared, progress=False)
    assert done.timesteps.tolist() == [0, 333, 666]
    assert set(prepared.cache.visits.values()) == {3}
    pipe.unet = done
    images = pipe(batch_size=1, num_inference_steps=3, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_calibration_by_a_scheduler_and_a_shape(toy):
    _, scheduler = pipelines()["ddim"]
    source = scheduler(num_train_timesteps=100)
    prepared = prepare(toy, data(8)[0], config=fast("w8a16"))
    calibrate(prepared, (source, (3, 8, 8)), num_inference_steps=4, samples=3, progress=False)
    assert source.num_inference_steps is None  # the given one is left alone
    assert convert(prepared, progress=False).timesteps.tolist() == [0, 25, 50, 75]
    assert prepared.cache.visits == {75: 3, 50: 3, 25: 3, 0: 3}


def test_calibration_by_tuples_and_by_dicts_is_the_same(toy, toys):
    prepared = prepare(toy, data(8)[0], timesteps=TIMES, config=fast("w4a8"))
    calibrate(prepared, ({"x": x, "t": t} for x, t in data(8)), progress=False)
    state = toys["w4a8"].state_dict()
    found = convert(prepared, progress=False).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in found.items())


def test_calibration_is_seeded(toy):
    _, scheduler = pipelines()["ddim"]

    def ranges(seed):
        prepared = prepare(toy, data(8)[0], config=fast("w8a8"))
        source = (scheduler(), (3, 8, 8))
        options = {"num_inference_steps": 2, "samples": 2, "progress": False}
        calibrate(prepared, source, seed=seed, **options)
        return {n: m.seen for n, m in prepared.observed.named_modules() if hasattr(m, "seen")}

    assert ranges(0) == ranges(0) != ranges(1)


# ---------------------------------------------------------------- the finite set


@pytest.mark.parametrize(
    "given, expected",
    [
        (4, [0, 1, 2, 3]),
        ([7, 3, 5], [3, 5, 7]),
        (torch.tensor([30, 10]), [10, 30]),
        (range(0, 9, 4), [0, 4, 8]),
        ([2.0, 1.0], None),
    ],
)
def test_timesteps_are_given_as_a_number_a_list_or_a_tensor(toy, given, expected):
    model = fold_timesteps(toy, given, data(8)[0])
    keys = model.timesteps
    assert keys.tolist() == (expected or [1.0, 2.0])
    assert keys.dtype == (torch.float64 if expected is None else torch.int64)


def test_timesteps_are_taken_from_a_scheduler(toy):
    _, scheduler = pipelines()["ddim"]
    source = scheduler()
    source.set_timesteps(5)
    assert fold_timesteps(toy, source, data(8)[0]).timesteps.tolist() == [0, 200, 400, 600, 800]


def test_timesteps_left_out_are_those_that_calibration_visits(toy):
    prepared = prepare(toy, data(8)[0], config="fp")
    assert prepared.timesteps is None
    calibrate(prepared, data(8, times=(40, 10)), progress=False)
    assert convert(prepared, progress=False).timesteps.tolist() == [10, 40]


def test_steps_that_calibration_does_not_visit_get_interpolated_ranges(toy):
    prepared = prepare(toy, data(8)[0], timesteps=[0, 100, 200], config=fast("w8a16"))
    calibrate(prepared, data(8, times=(0, 200)), progress=False)
    assert convert(prepared, progress=False).timesteps.tolist() == [0, 100, 200]
    prepared = prepare(toy, data(8)[0], timesteps=[0, 100, 200], config=fast("w8a8", mode="table"))
    calibrate(prepared, data(8, times=(0, 200)), progress=False)
    found = report(convert(prepared, progress=False)).data["sites"]
    assert {site["interpolated"] for site in found.values()} == {1}


def test_float_timesteps(toy):
    times = torch.tensor([0.25, 0.5, 1.0])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    prepared = prepare(toy, (x, torch.tensor([0.5, 0.5])), timesteps=times, config=fast("w8a8"))
    calls = [(x, t.expand(2).contiguous()) for t in times]
    done = convert(calibrate(prepared, calls, progress=False), progress=False)
    assert done.timesteps.tolist() == times.tolist()
    with torch.no_grad():
        assert sqnr(toy(*calls[1]), done(*calls[1])) > LEAST["w8a8"]
        assert torch.equal(done(x, 0.5), done(*calls[1]))
    with torch.no_grad():  # between two of them
        assert sqnr(toy(x, torch.full((2,), 0.3)), done(x, 0.3)) > LEAST["w8a8"]
    with pytest.raises(InputError, match=r"t: nan is not among"):
        done(x, float("nan"))


@pytest.mark.parametrize("kind", ["toy", "unet"])
def test_folding_is_exact_at_batch_one_at_every_timestep(kind, request):
    model, size = request.getfixturevalue(kind), {"toy": 8, "unet": 16}[kind]
    times = list(range(0, 1000, 125))
    folded = fold_timesteps(model, times, data(size)[0] if kind == "toy" else None)
    assert report(folded).weight_coverage == 0.0
    assert folded.nbytes() < sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        for x, t in data(size, count=1, times=times):
            assert torch.equal(answer(folded(x, t)), answer(model(x, t))), t
        for count in (2, 5):
            for x, t in data(size, count=count, times=times[::3]):
                expected, found = answer(model(x, t)), answer(folded(x, t))
                assert (found - expected).norm() / expected.norm() < 1e-5


# ---------------------------------------------------------------- which form the features take


@pytest.mark.parametrize(
    "temporal, chosen",
    [
        ({"mode": "table"}, {TABLE}),
        ({"mode": "cache", "cache_bits": (8,)}, {"cache8"}),
        ({"mode": "cache", "cache_bits": (4,)}, {"cache4"}),
        ({"mode": "tib"}, {TIB}),
        ({"mode": "select", "budget": 1 << 40}, {TABLE}),
    ],
)
def test_every_form_of_temporal_features_comes_through(toy, temporal, chosen, tmp_path):
    done = converted(toy, 8, fast("w4a8", **temporal))
    features = report(done).data["temporal"]["features"]
    assert {f["chosen"] for f in features.values()} == chosen
    assert ("time_mlp.0" in report(done).data["sites"]) == (chosen == {TIB})
    assert report(done).weight_coverage == 1.0
    x, t = data(8)[1]
    with torch.no_grad():
        assert sqnr(toy(x, t), done(x, t)) > LEAST["w4a8"]
        save(done, tmp_path / "m")
        assert torch.equal(load(tmp_path / "m")(x, t), done(x, t))


def test_a_budget_shrinks_what_the_features_take(toy):
    sizes = []
    for budget in (1 << 40, 1000):
        done = converted(toy, 8, fast("w8a8", budget=budget))
        temporal = report(done).data["temporal"]
        picked = [f["candidates"][f["chosen"]]["bytes"] for f in temporal["features"].values()]
        sizes.append(sum(picked))
    assert sizes[1] <= 1000 < sizes[0]


def test_a_budget_that_cannot_be_met_says_what_could(toy):
    with pytest.raises(ConfigError, match="temporal budget of 1 bytes cannot be met: the smallest"):
        converted(toy, 8, fast("w8a8", budget=1))


# ---------------------------------------------------------------- saving, size, memory


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["toys", "unets"])
def test_a_saved_model_comes_back_bit_identical(kind, name, request, tmp_path):
    model, size = request.getfixturevalue(kind)[name], {"toys": 8, "unets": 16}[kind]
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert loaded.recipe == model.recipe
    assert torch.equal(loaded.timesteps, model.timesteps)
    assert report(loaded).data == report(model).data
    with torch.no_grad():
        for x, t in data(size):
            assert torch.equal(answer(loaded(x, t)), answer(model(x, t)))
    if kind == "unets":
        x, t = data(size)[0]
        assert type(loaded(x, t)).__name__ == "UNet2DOutput"
        assert loaded.config.in_channels == 3 and loaded.config["sample_size"] == 16
    with pytest.raises(InputError, match=r"7 is not among the 3 timesteps .*refresh\(model, sou"):
        loaded(data(size)[0][0], 7)  # its features cannot be computed: the model is not there


def test_loading_needs_no_code_of_the_original(tmp_path, toys):
    import subprocess
    import sys

    save(toys["w4a8"], tmp_path / "model")
    script = (
        "import sys, torch, tfmq_fx; m = tfmq_fx.load(sys.argv[1]);"
        "y = m(torch.zeros(1, 3, 8, 8), 250); assert y.isfinite().all();"
        "assert not any(n.startswith(('tests', 'diffusers')) for n in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Stack(nn.Module):
    """Enough weights that what is stored besides them does not count."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 256)
        self.enter, self.leave = nn.Conv2d(3, 256, 1), nn.Conv2d(256, 3, 1)
        self.layers = nn.ModuleList(nn.Conv2d(256, 256, 3, padding=1) for _ in range(3))

    def forward(self, x, t):
        h = self.enter(x) + self.time(t[:, None] / 1000.0)[:, :, None, None]
        for layer in self.layers:
            h = h + layer(torch.tanh(h))
        return self.leave(h)


def test_four_bit_weights_take_about_a_seventh_on_disk_and_in_memory(tmp_path):
    model = seeded(Stack).eval()
    nearest = ReconstructionSpec(rounding="nearest")
    recipe = dataclasses.replace(fast("w4a8"), reconstruction=nearest)
    done = converted(model, 4, recipe)
    full = sum(p.nbytes for p in model.parameters())
    # A 4-bit weight is 1/8 of a float. Beside it each of the 1027 channels has a scale (4 B), a
    # zero point (1 B) and a bias (4 B), the ends have 8 bits, features take 8 bits in 3 rows, and
    # the JSON with the graph takes about 60 KB: 1.77 M weights / 2 + 0.07 MB of 7.1 MB is 1 / 7.4.
    save(done, tmp_path / "model")
    assert full / 8 < artifact.saved_bytes(tmp_path / "model") < full / 7
    assert full / 8 < done.nbytes() < full / 7.5
    eight = converted(model, 4, dataclasses.replace(recipe, layers=PRESETS["w8a8"].layers))
    assert full / 4 < eight.nbytes() < full / 3.8


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent_and_equal(toys, name):
    model = toys[name]
    x, t = data(8)[0]
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(x, t), model(x, t))
    assert torch.equal(duplicate.timesteps, model.timesteps)
    theirs = {b.data_ptr() for b in duplicate.tensors() if b.numel()}
    assert not theirs & {b.data_ptr() for b in model.tensors() if b.numel()}
    other = duplicate(x, 7)  # a timestep that neither was made for
    assert not model.unvisited.met and torch.equal(copy.deepcopy(duplicate)(x, 7), other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp", "w8a8", "w4a16"])
def test_half_precision_keeps_keys_and_scales(toys, name, dtype):
    model = copy.deepcopy(toys[name]).to(dtype)
    assert model.dtype == dtype
    buffers = dict(model.gm.named_buffers(recurse=False))
    for key, value in buffers.items():
        kept = {"temporal_keys": torch.int64, "activation_scales": torch.float32}
        assert value.dtype == kept.get(key, dtype), key
        if key in kept:
            assert torch.equal(value, getattr(toys[name].gm, key))
    for layer in model.gm.modules():
        if isinstance(layer, QuantLayer):
            assert layer.weight_scale.dtype == layer.act_scale.dtype == torch.float32
    x, t = data(8)[1]
    with torch.no_grad():
        found, expected = model(x.to(dtype), t), toys[name](x, t)
    assert found.dtype == dtype
    # bfloat16 keeps 8 bits: 2**-9 of relative rounding (54 dB), some 30 times in a row (-15 dB),
    # and codes that fall on the other side of a step
    assert sqnr(expected, found.float()) > 25
    with pytest.raises(InputError, match=f"x: captured for {dtype}, got torch.float32"):
        model(x, t)


def test_torch_compile_takes_the_converted_model_whole(toys):
    x, t = data(8)[1]
    for name in ("fp", "w8a8"):
        torch._dynamo.reset()
        found = torch.compile(toys[name], backend="eager", fullgraph=True)(x, t)
        assert torch.equal(found, toys[name](x, t)), name


def test_torch_export_takes_the_graph(toys):
    x, t = data(8)[1]
    program = torch.export.export(toys["w8a8"], (x, t))
    assert torch.equal(program.module()(x, t), toys["w8a8"](x, t))


# ---------------------------------------------------------------- compile


def test_the_eager_backend_is_the_reference(toys):
    x, t = data(8)[1]
    compiled = compile(toys["w4a8"], "eager")
    assert compiled.backend == "eager" and compiled.lowered == 0
    assert torch.equal(compiled(x, t), toys["w4a8"](x, t))
    assert len(compiled.declined) == len(report(toys["w4a8"]).data["sites"])
    assert {reason for _, reason in compiled.declined} == {"eager computes in floating point"}
    assert "backend=eager, 0 integer layers" in repr(compiled)
    assert torch.equal(compiled(x, 7), copy.deepcopy(toys["w4a8"])(x, 7))  # by the reference


def test_auto_falls_back_to_eager_and_says_why(toys, monkeypatch):
    from tfmq_fx.backends import float, inductor, openvino

    for backend in (inductor, float, openvino):
        monkeypatch.setattr(backend, "unavailable", lambda device: "no compiler today")
    compiled = compile(toys["w8a8"], mode="max-autotune")
    assert compiled.backend == "eager"
    for name, found in zip(("inductor", "openvino", "float"), compiled.declined, strict=False):
        reason = f"backend '{name}': no compiler today. Use backend='eager'."
        assert found == ["the whole model", reason]
    with pytest.raises(BackendError, match="'inductor': no compiler today"):
        compile(toys["w8a8"], "inductor")


@pytest.mark.parametrize("name", ["tensorrt", "onnx"])
def test_unknown_backends_are_named(toys, name):
    with pytest.raises(BackendError, match=f"backend '{name}'"):
        compile(toys["w8a8"], name)


def test_only_converted_models_are_compiled_and_saved(toys, prepared, toy, tmp_path):
    compiled = compile(toys["w8a8"], "eager")
    for wrong in (compiled, prepared, toy):
        kind = type(wrong).__name__
        with pytest.raises(ArtifactError, match=rf"save\(\) takes what convert\(\) .* a {kind}"):
            save(wrong, tmp_path / "model")
        with pytest.raises(ConfigError, match=rf"compile\(\) takes what convert\(\).* a {kind}"):
            compile(wrong, "eager")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timestep": "tau"}, "no input named 'tau'; the example inputs are x, t"),
        ({"config": "w3a3"}, "unknown config 'w3a3'; presets are fp, w8a8"),
        ({"config": {}}, "unknown config {}; presets are"),
        ({"timesteps": []}, "timesteps are empty"),
        ({"timesteps": 0}, "timesteps are empty"),
        ({"timesteps": -3}, "timesteps are empty"),
        ({"timesteps": [1, 2, 1]}, r"duplicate timesteps \(as torch.int64\): 1"),
        ({"timesteps": [1.0, float("nan")]}, "timesteps hold NaN or Inf"),
        ({"timesteps": [[1, 2]]}, "of one dimension, or a scheduler; got a list among them"),
        ({"timesteps": True}, "not a bool"),
        ({"timesteps": "ddim"}, "of one dimension, or a scheduler; got 'ddim'"),
        ({"timesteps": object()}, "of one dimension, or a scheduler; got a object"),
        ({"overrides": {"nope*": LayerConfig()}}, r"'nope\*' matches no layer; .*\(29 in all\)"),
        ({"overrides": {"conv_in": "w4"}}, "override 'conv_in' must be a LayerConfig, got str"),
        ({"dynamic": ("height",)}, r"dynamic: unknown \['height'\]"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(toy, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(toy, data(8)[0], **options)


def test_a_layer_cannot_have_integer_inputs_and_float_weights():
    with pytest.raises(ConfigError, match="cannot be quantized with floating-point weights"):
        LayerConfig(activations=ActivationSpec())


def test_overrides_reach_the_layers_that_they_match(toy):
    eight = LayerConfig(weights=WeightSpec(bits=8))
    overrides = {"down*.conv1": eight, "smooth": LayerConfig()}
    done = converted(toy, 8, fast("w4a8"), overrides=overrides)
    sites = report(done).data["sites"]
    assert [sites[n]["weight_bits"] for n in ("down1.conv1", "down2.conv1", "mid1.conv1")] == [
        8,
        8,
        4,
    ]
    assert sites["down1.conv1"]["act_bits"] is None
    assert sites["smooth"]["kind"] == "Conv2d" and sites["smooth"]["weight_bits"] is None
    assert 0.9 < report(done).weight_coverage < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_data_with_nan_or_inf_names_the_layer(toy, value):
    x, t = data(8)[1]
    x[0, 0, 0, 0] = value
    for name in ("w8a8", "w4a16"):
        prepared = prepare(toy, data(8)[0], timesteps=TIMES, config=fast(name))
        with pytest.raises(CalibrationError, match="conv_in holds NaN or Inf at timestep 250"):
            calibrate(prepared, [(x, t)], progress=False)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_with_nan_or_inf_are_named(value):
    broken = seeded(ToyUNet).eval()
    with torch.no_grad():
        broken.down2.conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(ConfigError, match=r"down2\.conv1\.weight holds NaN or Inf"):
        prepare(broken, data(8)[0])


def test_parameters_outside_layers_with_nan_are_found_in_calibration():
    broken = seeded(ToyUNet).eval()
    with torch.no_grad():
        broken.norm_out.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="the input of conv_out holds NaN or Inf"):
        calibrated(broken, 8, fast("w8a8"))


def test_conversion_before_calibration_says_what_to_do(toy):
    example = data(8)[0]
    with pytest.raises(CalibrationError, match=r"no timestep is known.*calibrate\(prepared"):
        convert(prepare(toy, example, config="w8a8"))
    with pytest.raises(CalibrationError, match=r"29 of 29 layers saw no data \(time_mlp\.0, "):
        convert(prepare(toy, example, timesteps=TIMES, config="w8a8"))
    with pytest.raises(CalibrationError, match="rounding weights needs sample inputs"):
        convert(prepare(toy, example, timesteps=TIMES, config=fast("w4a16")), progress=False)
    empty = calibrate(prepare(toy, example, timesteps=TIMES), [], progress=False)
    with pytest.raises(CalibrationError, match="29 of 29 layers saw no data"):
        convert(empty)
    with pytest.raises(ConfigError, match=r"convert\(\) takes what prepare\(\) returned, not a T"):
        convert(toy)


def test_weights_alone_rounded_to_nearest_need_no_data(toy):
    layers = LayerConfig(weights=WeightSpec(bits=8))
    recipe = Config(
        layers=layers,
        temporal=TemporalSpec(mode="table"),
        reconstruction=ReconstructionSpec(rounding="nearest"),
    )
    done = convert(prepare(toy, data(8)[0], timesteps=TIMES, config=recipe), progress=False)
    assert report(done).weight_coverage == 1.0


@pytest.mark.parametrize(
    "source, message",
    [
        (5, r"a \(scheduler, shape\) pair or an iterable of inputs, got int"),
        (None, "an iterable of inputs, got NoneType"),
        (nn.Linear(1, 1), "an iterable of inputs, got Linear"),
        ("abc", "each a tuple or a dict of arguments; it gave a str"),
        ([1, 2], "each a tuple or a dict of arguments; it gave a int"),
        (torch.zeros(2, 3, 8, 8), "it gave a Tensor"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), "it gave a Tensor"),
        ({"x": 1}, "it gave a str"),
    ],
)
def test_calibration_sources_that_cannot_be_used_are_named(prepared, source, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(prepared, source, progress=False)


def test_calibration_outside_the_set_is_refused(prepared):
    with pytest.raises(InputError, match="t: 77 is not among the 3 timesteps"):
        calibrate(prepared, data(8, times=(77,)), progress=False)


def test_a_pipeline_of_another_model_is_refused(prepared, unet):
    pipeline, scheduler = pipelines()["ddpm"]
    with pytest.raises(ConfigError, match=r"not a component of this DDPMPipeline \(components: "):
        calibrate(prepared, pipeline(unet, scheduler()), progress=False)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((torch.zeros(2, 2, 8, 8), 0), {}, "x: dimension 1 was captured as 3, got 2"),
        ((torch.zeros(3, 8, 8), 0), {}, "x: expected 4 dimensions"),
        ((torch.zeros(2, 3, 8, 8).half(), 0), {}, "captured for torch.float32, got torch.float16"),
        ((torch.zeros(2, 3, 8, 8),), {}, "missing argument 't'"),
        ((torch.zeros(2, 3, 8, 8), 0, 1), {}, "3 positional arguments given, at most 2 taken"),
        ((torch.zeros(2, 3, 8, 8), 0), {"y": 1}, "no argument 'y'; the model takes x, t"),
        ((torch.zeros(2, 3, 8, 8), 0), {"t": 1}, "argument 't' is given twice"),
        ((None, 0), {}, "x: expected a tensor, got None"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(3).long()), {}, "3 timesteps for a batch of 2"),
        ((torch.zeros(2, 3, 8, 8), "0"), {}, "t: expected a number, .* got str"),
        ((torch.zeros(2, 3, 8, 8), True), {}, "t: expected a number, .* got bool"),
    ],
)
@pytest.mark.parametrize("name", ["fp", "w8a8"])
def test_calls_that_were_not_captured_are_refused(toys, name, args, kwargs, message):
    with pytest.raises(InputError, match=message):
        toys[name](*args, **kwargs)


@pytest.mark.parametrize("name", ["fp", "w8a8"])
def test_floats_where_integers_were_captured_are_answered_by_another_graph(toys, toy, name):
    x, ours = torch.zeros(1, 3, 8, 8), toys[name]
    for t in (0.5, torch.zeros(1)):
        want = toy(x, torch.as_tensor(t).reshape(1))
        got = ours(x, t)
        assert torch.equal(got, want) if name == "fp" else (got - want).abs().max() < 0.1
    assert torch.equal(ours(x, torch.zeros(1)), ours(x, 0))


@pytest.mark.parametrize("name", ["fp", "w8a8"])
def test_a_timestep_without_rows_is_refused_where_the_source_is_gone(toys, name):
    model = copy.deepcopy(toys[name])
    model.forget_source()
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"t: 1 is not among the 3 timesteps .*0 to 999"):
        model(x, 1)
    with pytest.raises(InputError, match=r"t: 2 is not among .*refresh\(model, source, timeste"):
        model(x, torch.tensor([0, 2]))


def test_saving_where_it_cannot_be_done_is_refused(toys, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="file exists and is not a directory"):
        save(toys["w8a8"], tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty and not a model saved by tfmq_fx"):
        save(toys["w8a8"], tmp_path / "other")
    with pytest.raises(ArtifactError, match="cannot make the directory"):
        save(toys["w8a8"], tmp_path / "file" / "deeper" / "model")
    assert (tmp_path / "file").read_text() == "mine"


def test_loading_what_is_missing_or_damaged_is_refused(toys, tmp_path):
    with pytest.raises(ArtifactError, match="there is no such directory"):
        load(tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ArtifactError, match="is not a model saved by tfmq_fx"):
        load(tmp_path / "foreign")
    place = tmp_path / "model"
    save(toys["w8a8"], place)
    weights = place / artifact.TENSORS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="is truncated or was altered: its bytes is"):
        load(place)
    graph = place / artifact.GRAPH_FILE
    graph.write_text(graph.read_text()[:-100])
    with pytest.raises(ArtifactError, match="is truncated or not JSON"):
        load(place)


def test_a_save_over_an_earlier_one_replaces_it(toys, tmp_path):
    x, t = data(8)[0]
    save(toys["w8a8"], tmp_path / "model")
    save(toys["w4a8"], tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(x, t), toys["w4a8"](x, t))


def test_the_public_names_are_those_of_the_package():
    for name in ("prepare", "calibrate", "convert", "compile", "save", "load", "fold_timesteps"):
        assert getattr(tfmq_fx, name) is getattr(tfmq_fx.api, name)
