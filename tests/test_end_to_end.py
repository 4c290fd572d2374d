"""Published architectures, quantized: prepare, calibrate, convert, save, compile."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tfmq_fx import (
    PRESETS,
    Config,
    ConfigError,
    Converted,
    Prepared,
    bind_request,
    calibrate,
    compile,
    convert,
    load,
    prepare,
    report,
    save,
)
from tfmq_fx.backends.cpu import kernels
from tfmq_fx.backends.inductor import unavailable
from tfmq_fx.backends.saturation import onednn_is_exact
from tfmq_fx.capture.inputs import find_timestep
from tfmq_fx.capture.nested_values import outline
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import sqnr

NAMES = ("sd15", "sdxl", "dit-xl-2", "pixart-alpha", "flux-dev")
RECIPES = ("w8a8", "w4a8")
FLOW = {"flux-dev": (1.0, 0.6, 0.25)}  # the rest count time from 999 down
ENDS = {
    "sd15": ("conv_in", "conv_out"),
    "sdxl": ("conv_in", "conv_out"),
    "dit-xl-2": ("pos_embed.proj", "proj_out_2"),
    "pixart-alpha": ("pos_embed.proj", "proj_out"),
    "flux-dev": ("x_embedder", "proj_out"),
}
# What the text (or the label and the guidance) passes through.
CONDITIONS = {
    "sd15": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k"},
    "sdxl": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "add_embedding.linear_1"},
    "dit-xl-2": {"transformer_blocks.0.norm1.linear", "proj_out_1"},
    "pixart-alpha": {"caption_projection.linear_1", "transformer_blocks.1.attn2.to_k"},
    "flux-dev": {
        "context_embedder",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.guidance_embedder.linear_2",
    },
}
# Output SQNR in dB at least, on data that calibration did not see. An 8-bit grid over the range of
# a normal input (some 4 deviations each way) leaves 41 dB at each layer, a 4-bit grid over the
# weights 20, and second-order rounding gains some 4. In a UNet the noise of 160 layers adds up
# through few skips: up to 20 dB less at 8 bits, and 10 at 4, where layers of other signs cancel.
# The transformers have 17 to 48 layers on branches whose gates are small in a random model, so that
# the stream itself stays nearly exact. Two or three decibels are off for the draw of the data.
FLOOR = {
    "sd15": {"w8a8": 22.0, "w4a8": 12.0},
    "sdxl": {"w8a8": 22.0, "w4a8": 12.0},
    "dit-xl-2": {"w8a8": 30.0, "w4a8": 28.0},
    "pixart-alpha": {"w8a8": 32.0, "w4a8": 30.0},
    "flux-dev": {"w8a8": 30.0, "w4a8": 27.0},
}
VIDEO = {"w8a8": 30.0, "w4a8": 15.0}


def fast(name: str, **temporal: Any) -> Config:
    """A preset with a few steps of every search."""
    recipe = PRESETS[name]

    def few(layer: Any) -> Any:
        if layer is None or layer.weights is None:
            return layer
        return dataclasses.replace(layer, weights=dataclasses.replace(layer.weights, search=4))

    return dataclasses.replace(
        recipe,
        layers=few(recipe.layers),
        first=few(recipe.first),
        last=few(recipe.last),
        temporal=dataclasses.replace(recipe.temporal, **{"tiar_iters": 0, **temporal}),
    )


def without_sdxl(names: Iterable[str]) -> list[Any]:
    """These models, SDXL in the slow tests: much of it is SD 1.5's."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n == "sdxl" else []) for n in names]


def four_bits_of_small_ones(names: Iterable[str], slow: Iterable[str] = ()) -> list[Any]:
    """These models in 8 bits, and in 4 all but the UNets, which the slow tests have."""
    return [
        pytest.param(
            name,
            recipe,
            marks=[pytest.mark.slow]
            if name in slow or (recipe == "w4a8" and name in ("sd15", "sdxl"))
            else [],
        )
        for name in names
        for recipe in RECIPES
    ]


def steps_of(name: str) -> tuple[float, ...]:
    return FLOW.get(name, (999, 600, 250))


def redrawn(value: Any, key: str, batch: int, generator: torch.Generator) -> Any:
    """`value` with other contents: tensors that carry the batch are drawn, the rest stays."""
    if isinstance(value, dict):
        return {k: redrawn(v, k, batch, generator) for k, v in value.items()}
    if not isinstance(value, Tensor) or value.shape[:1] != (batch,):
        return value
    if key == "class_labels":  # each class in turn: one that calibration missed would be clipped
        return (torch.arange(batch) * 2 + generator.initial_seed()) % 10
    if key == "guidance":
        return torch.empty(batch).uniform_(1, 6, generator=generator)
    if value.dim() == 1 or not value.is_floating_point():  # the timestep, masks of padded text
        return value
    return torch.randn(value.shape, generator=generator)


def calls(name: str, model: nn.Module, batch: int, seed: int) -> Iterator[dict[str, Any]]:
    """One call for each step, `batch` samples of their own in each."""
    generator = torch.Generator().manual_seed(seed)
    inputs = zoo.inputs(name, model, batch)
    timestep = find_timestep(inputs, None)
    for step in steps_of(name):
        drawn = {k: redrawn(v, k, batch, generator) for k, v in inputs.items()}
        yield {**drawn, timestep: torch.full_like(inputs[timestep], step)}


def answer(output: Any) -> Tensor:
    found: Tensor = outline(output)[1][0][1]
    return found


@functools.cache
def calibrated(name: str) -> tuple[nn.Module, Prepared]:
    model = zoo.model(name)
    prepared = prepare(model, zoo.inputs(name, model), config=fast("w8a8"))
    for seed in (0, 1):  # the even labels, the odd ones
        calibrate(prepared, calls(name, model, 5, seed), progress=False)
    return model, prepared


@functools.cache
def converted(name: str, recipe: str) -> Converted:
    _, prepared = calibrated(name)
    prepared.recipe = fast(recipe)  # what calibration records is the same for every recipe
    return convert(prepared, progress=False)


def error_db(name: str, found: Any, batch: int, seed: int) -> list[float]:
    model, _ = calibrated(name)
    with torch.no_grad():
        return [
            sqnr(answer(model(**given)), answer(found(**given)))
            for given in calls(name, model, batch, seed)
        ]


# ---------------------------------------------------------------- what is quantized


@pytest.mark.parametrize(("name", "recipe"), four_bits_of_small_ones(NAMES, slow=["sdxl"]))
def test_every_layer_is_quantized_or_a_row(name: str, recipe: str) -> None:
    model, prepared = calibrated(name)
    done = converted(name, recipe)
    found = report(done)
    assert found.weight_coverage == found.activation_coverage == 1.0
    assert found.data["declined"] == [] == [d for p in found.data["passes"] for d in p["declined"]]
    sites = found.data["sites"]
    layers = {p for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    kept = {n.target for n in prepared.gm.graph.find_nodes(op="call_module")} & layers
    removed = set(found.data["removed"]) & layers
    assert not removed & set(sites) and removed | set(sites) == kept
    assert removed == set(found.data["block"]["modules"])  # all tables here: they are small
    assert sites.keys() >= CONDITIONS[name]
    first, last = ENDS[name]
    bits = int(recipe[1])
    for path, site in sites.items():
        expected = (8, 16) if path == first else (8, 8) if path == last else (bits, 8)
        assert (site["weight_bits"], site["act_bits"]) == expected, path
        assert site["ranges"] == "per timestep" and site["interpolated"] == 0, path
    assert json.loads(json.dumps(found.data)) == found.data
    text = str(found)
    assert all(path in text for path in sites) and "100.0 % of weights" in text
    assert found.data["bytes"] < found.data["float_bytes"] / (2.4 if recipe == "w8a8" else 3)


@torch.no_grad()
@pytest.mark.parametrize(("name", "recipe"), four_bits_of_small_ones(NAMES))
def test_every_weight_is_near_its_own(name: str, recipe: str) -> None:
    """Outputs of random transformers hardly move with their blocks; this looks at every layer."""
    model, _ = calibrated(name)
    done = converted(name, recipe)
    errors = []
    for path in report(done).data["sites"]:
        weight = model.get_submodule(path).weight
        errors.append(float((done.gm.get_submodule(path).weight - weight).norm() / weight.norm()))
    # A grid of 2^b - 1 steps over a uniform weight leaves 2^-b of its norm: 0.4 and 6 %. Aligning
    # the weights to inputs that carry noise moves them by some per cent more.
    usual, worst = (0.03, 0.15) if recipe == "w8a8" else (0.16, 0.3)
    assert sorted(errors)[len(errors) // 2] < usual and max(errors) < worst


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_near_to_full_precision(name: str, recipe: str) -> None:
    done, floor = converted(name, recipe), FLOOR[name][recipe]
    for batch in (1, 3):
        found = error_db(name, done, batch, seed=10 + batch)
        assert min(found) >= floor, found


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_called_like_the_original(name: str) -> None:
    """Every form of the timestep, several timesteps in a batch, both types of output."""
    model, _ = calibrated(name)
    done = converted(name, "w8a8")
    given = next(calls(name, model, 3, seed=5))
    timestep = find_timestep(given, None)
    t = given[timestep]
    expected = done(**given)
    assert type(expected) is type(model(**given))
    same = {"number": t[0].item(), "0-d": t[0], "one row": t[:1], "expanded": t[0].expand(3)}
    for form, value in same.items():
        assert torch.equal(answer(done(**{**given, timestep: value})), answer(expected)), form
    (plain,) = done(**given, return_dict=False)
    assert type(done(**given, return_dict=False)) is tuple and torch.equal(plain, answer(expected))
    mixed = {**given, timestep: torch.tensor(steps_of(name)).to(t)}
    assert sqnr(answer(model(**mixed)), answer(done(**mixed))) >= FLOOR[name]["w8a8"]


@pytest.mark.parametrize("name", NAMES)
def test_what_pipelines_read_still_answers(name: str) -> None:
    model, prepared = calibrated(name)
    done = converted(name, "w8a8")
    for found in (prepared, done, compile(done, "eager"), copy.deepcopy(done)):
        assert found.config["in_channels"] == found.config.in_channels == model.config.in_channels
        assert found.dtype == torch.float32 and found.device == torch.device("cpu")
        with found.cache_context("cond"):
            pass
        if name == "sdxl":
            assert found.add_embedding.linear_1.in_features == 80
            assert found.conv_in.kernel_size == (3, 3)
        if name in ("sd15", "sdxl"):  # of the second model, tables took it
            layer = model.time_embedding.linear_1
            assert found.time_embedding.linear_1.in_features == layer.in_features


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_copied_models_are_the_same(name: str, tmp_path: Any) -> None:
    model, _ = calibrated(name)
    done = converted(name, "w4a8")
    save(done, tmp_path / "model")
    loaded = load(tmp_path / "model")
    for given in calls(name, model, 2, seed=20):
        with torch.no_grad():
            expected = answer(done(**given))
            assert torch.equal(answer(loaded(**given)), expected)
            assert torch.equal(answer(copy.deepcopy(done)(**given)), expected)
        break
    assert loaded.config["in_channels"] == model.config.in_channels
    assert loaded.record == json.loads(json.dumps(done.record))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_cast_is_refused_and_a_capture_in_bfloat16_is_exact(name: str) -> None:
    """Some of what these models compute in float32 they do in any dtype; a graph cannot tell."""
    model, _ = calibrated(name)
    with pytest.raises(ConfigError, match=r"captured in torch\.float32 and cannot be cast to"):
        copy.deepcopy(converted(name, "w8a8")).to(torch.bfloat16)

    def low(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: low(v) for k, v in value.items()}
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.bfloat16() if floating else value

    low_model = copy.deepcopy(model).to(torch.bfloat16)
    given = low(next(calls(name, model, 2, seed=30)))
    made = bind_request(low_model, None, given)  # what the message says to do
    found = answer(made(**given))
    assert found.dtype == torch.bfloat16 and torch.equal(found, answer(low_model(**given)))


# ---------------------------------------------------------------- pipelines


DDIM, EULER = "DDIMScheduler", "EulerDiscreteScheduler"
FLOW_EULER = "FlowMatchEulerDiscreteScheduler"


def tiny_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(sample_size=16, **sizes).eval()


def pipeline(name: str, model: nn.Module, scheduler: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline of `model` and parts with random weights, and how it is called."""
    import diffusers

    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {"num_inference_steps": 3}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        vae = tiny_vae()
    absent = {"text_encoder": None, "tokenizer": None}
    if name == "dit-xl-2":
        pipe = diffusers.DiTPipeline(model, vae, scheduler, id2label={1: "tench"})
        return pipe, common | {"class_labels": [1, 207, 360], "output_type": "pt"}
    tokens = zoo.inputs(name, model)["encoder_hidden_states"].shape[1]
    texts = {"prompt_embeds": draw(2, tokens, 32), "output_type": "latent"}
    if name == "flux-dev":
        absent |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = diffusers.FluxPipeline(scheduler, vae, transformer=model, **absent)
        size = {"height": 32, "width": 32, "pooled_prompt_embeds": draw(2, 32)}
        return pipe, common | texts | size
    texts |= {"negative_prompt_embeds": draw(2, tokens, 32), "height": 16, "width": 16}
    if name == "sdxl":
        absent |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = diffusers.StableDiffusionXLPipeline(vae, unet=model, scheduler=scheduler, **absent)
        texts |= {"pooled_prompt_embeds": draw(2, 32), "negative_pooled_prompt_embeds": draw(2, 32)}
        return pipe, common | texts
    pipe = diffusers.StableDiffusionPipeline(
        vae,
        unet=model,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **absent,
    )
    return pipe, common | texts


def schedule(kind: str) -> Any:
    import diffusers

    if kind == FLOW_EULER:
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, kind)(beta_schedule="scaled_linear")


# DDIM's timesteps are integers, the others' are floats.
@pytest.mark.parametrize(
    "name, kind",
    [
        ("sd15", DDIM),
        pytest.param("sd15", EULER, marks=[pytest.mark.slow, pytest.mark.sample]),
        pytest.param("dit-xl-2", DDIM, marks=pytest.mark.slow),
        ("dit-xl-2", EULER),
        pytest.param("sdxl", DDIM, marks=pytest.mark.slow),
        ("flux-dev", FLOW_EULER),
    ],
)
def test_through_a_pipeline(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model(name)
    if name == "dit-xl-2":  # its pipeline takes 1000 to mean no class
        monkeypatch.setitem(zoo.ENTRIES["dit-xl-2"].reduced, "num_embeds_ada_norm", 1000)
        model = zoo.model(name)
    pipe, options = pipeline(name, model, schedule(kind))
    pipe.set_progress_bar_config(disable=True)
    reference = pipe(**options, generator=torch.Generator().manual_seed(1))[0]
    steps = None
    if kind == EULER:
        steps = copy.deepcopy(pipe.scheduler)
        steps.set_timesteps(3)
    before = (dict(vars(pipe)), dict(vars(pipe.scheduler)), copy.deepcopy(model.state_dict()))
    recipe = fast("w8a8")
    prepared = prepare(model, zoo.inputs(name, model), timesteps=steps, config=recipe)
    calibrate(prepared, pipe, progress=False, seed=1, **options)
    after = (dict(vars(pipe)), dict(vars(pipe.scheduler)), model.state_dict())
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert new[key] is value or (isinstance(value, Tensor) and torch.equal(new[key], value))
    done = convert(prepared, progress=False)
    assert report(done).weight_coverage == report(done).activation_coverage == 1.0
    assert len(done.timesteps) == 3
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    setattr(pipe, part, done)
    found = pipe(**options, generator=torch.Generator().manual_seed(1))[0]
    # Three steps, each of which adds its own error to the sample; guidance multiplies what sets two
    # answers apart, and their errors, by up to 7.5. DiT's images have been decoded and clipped.
    as_tensor = functools.partial(torch.as_tensor, dtype=torch.float32)
    assert sqnr(as_tensor(reference), as_tensor(found)) >= 15


# ---------------------------------------------------------------- torch.compile


def loop(name: str, run: Any, form: str, count: int, batch: int = 2) -> Iterator[tuple[Any, Any]]:
    """`count` steps of a denoising loop with `run`: what each was called with and answered."""
    model, _ = calibrated(name)
    given = next(calls(name, model, batch, seed=40))
    timestep = find_timestep(given, None)
    sample = "hidden_states" if "hidden_states" in given else "sample"
    t = given[timestep]
    for i in range(count):
        step = torch.full_like(t, steps_of(name)[i % 3])
        forms = {"rows": step, "0-d": step[0].clone(), "number": step[0].item()}
        given = {**given, timestep: forms[form]}
        with torch.no_grad():
            out = answer(run(**given))
        yield given, out
        x = given[sample]
        given = {**given, sample: x - 0.1 * out[:, : x.shape[1]]}


@pytest.mark.parametrize("name", without_sdxl(NAMES))
def test_one_graph_for_a_whole_loop(name: str, dynamo: Any) -> None:
    done = converted(name, "w8a8")
    counter = dynamo.testing.CompileCounterWithBackend(
        "aot_eager" if name in ("dit-xl-2", "flux-dev") else "eager"
    )
    compiled = torch.compile(done, fullgraph=True, backend=counter)
    steps = loop(name, compiled, "0-d", 4)
    for i, (given, out) in enumerate(steps):
        with dynamo.config.patch(error_on_recompile=i > 0), torch.no_grad():
            assert sqnr(answer(done(**given)), out) >= 60
    assert counter.frame_count == 1 and not dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize(
    "name, recipe",
    [
        pytest.param(*case, marks=[pytest.mark.sample] if case == ("dit-xl-2", "w8a8") else [])
        for case in itertools.product(NAMES, RECIPES)
    ],
)
def test_integer_kernels_for_a_whole_loop(name: str, recipe: str, dynamo: Any) -> None:
    done = converted(name, recipe)
    compiled = compile(done, "inductor")
    sites = report(done).data["sites"]
    first = ENDS[name][0]
    reason = "runs in floating point: activations have 16 bits"
    others = [each for each in compiled.declined if each != [first, reason]]
    assert [first, reason] in compiled.declined
    assert compiled.lowered == len(sites) - len(compiled.declined)
    if kernels.unavailable() is None or onednn_is_exact():
        assert others == []
    else:  # processors where products of 8-bit weights could saturate run those layers in floats
        assert all("saturate" in why for _, why in others)
    for form in ("rows", "0-d", "number"):
        for i, (given, out) in enumerate(loop(name, compiled, form, 20)):
            with torch.no_grad():
                expected = answer(done(**given))
            # The same integers but where float rounding falls on the other side of a half: one
            # step there, which the next layers round anew. At worst that is another draw of the
            # rounding noise that parts both from full precision.
            assert sqnr(expected, out) >= FLOOR[name][recipe]
            if (form, i) == ("rows", 0):
                guard = dynamo.config.patch(error_on_recompile=True)
                guard.__enter__()
    guard.__exit__(None, None, None)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]
    if name == "sdxl":
        assert compiled.add_embedding.linear_1.in_features == 80


# ---------------------------------------------------------------- the temporal part


TEMPORAL = {  # a layer of the block, and what reads the features
    "sd15": "time_embedding.linear_1",
    "sdxl": "time_embedding.linear_2",  # the text and the sizes are added to it
    "wan-1.3b": "condition_embedder.time_proj",
    "cogvideox-2b": "time_embedding.linear_1",
}


@pytest.mark.parametrize("name", without_sdxl(TEMPORAL))
def test_the_temporal_part_as_rows_and_as_a_quantized_block(name: str) -> None:
    _, prepared = calibrated(name)
    done = {}
    for mode, iters in (("table", 0), ("tib", 60)):
        prepared.recipe = fast("w4a8", mode=mode, tiar_iters=iters)
        done[mode] = convert(prepared, progress=False)
    rows, block = done["table"], done["tib"]
    forms = rows.record["temporal"]["features"]
    assert forms and {f["chosen"] for f in forms.values()} == {"table"}
    assert all(f["error"] == 0 for f in forms.values())
    assert {f["chosen"] for f in block.record["temporal"]["features"].values()} == {"tib"}
    assert isinstance(block.gm.get_submodule(TEMPORAL[name]), QuantLayer)
    assert TEMPORAL[name] in rows.record["removed"] and not block.record["removed"]
    (learnt,) = (p for p in block.record["passes"] if p["name"] == "reconstruct_tib")
    details = learnt["details"]
    assert learnt["changed"] and details["error_after"] < details["error_before"]
    for found in done.values():
        assert report(found).weight_coverage == report(found).activation_coverage == 1.0
        assert min(error_db(name, found, 3, seed=50)) >= FLOOR.get(name, VIDEO)["w4a8"]
