"""config: values check themselves, print as code, and survive a round trip through plain dicts."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tfmq_fx
from tfmq_fx.core.config import AttentionSpec, Config, ReconstructionSpec, RewriteSpec, TemporalSpec
from tfmq_fx.core.config_json import from_dict, to_dict
from tfmq_fx.core.errors import ConfigError, TfmqError
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.core.presets import PRESETS, RECIPES, resolve

WEIGHTS = st.builds(
    WeightSpec, bits=st.integers(2, 8), symmetric=st.booleans(), search=st.integers(1, 99)
)
ACTIVATIONS = st.builds(
    ActivationSpec,
    bits=st.sampled_from((4, 5, 6, 7, 8, 16)),
    per_timestep=st.booleans(),
    dynamic=st.booleans(),
)
FP8_ACTIVATIONS = st.builds(
    ActivationSpec, format=st.just("fp8"), per_timestep=st.booleans(), dynamic=st.booleans()
)
LAYERS = st.one_of(
    st.builds(LayerConfig),
    st.builds(LayerConfig, weights=WEIGHTS, activations=st.none() | ACTIVATIONS),
    st.builds(
        LayerConfig,
        weights=st.just(WeightSpec(format="fp8")),
        activations=st.none() | FP8_ACTIVATIONS,
    ),
)
CONFIGS = st.builds(
    Config,
    name=st.text(),
    layers=LAYERS,
    first=st.none() | LAYERS,
    last=st.none() | LAYERS,
    temporal=st.builds(
        TemporalSpec,
        mode=st.sampled_from(("select", "table", "cache", "tib")),
        cache_bits=st.sampled_from(((8, 4), (8,), (4,))),
        budget=st.none() | st.integers(0, 10**12),
        tiar_iters=st.integers(0, 5000),
    ),
    reconstruction=st.builds(
        ReconstructionSpec,
        rounding=st.sampled_from(("nearest", "second-order")),
        iters=st.integers(0, 1000),
        samples=st.integers(1, 1000),
        memory=st.integers(1, 1 << 40),
        damping=st.floats(0, 1),
        seed=st.integers(0, 99),
    ),
)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_bits_by_name_and_survive_json(name):
    recipe = resolve(f"{name}-w5a6")
    assert recipe.name == f"{name}-w5a6"
    assert recipe.layers.weights.bits == 5 and recipe.layers.activations.bits == 6
    assert dataclasses.replace(recipe, name=name) == RECIPES[name][0](5, 6)
    for config in (recipe, PRESETS[name]):
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert PRESETS[name].name == name


@given(config=CONFIGS)
def test_a_config_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@given(config=CONFIGS)
def test_a_config_prints_as_the_call_that_makes_it(config):
    names = {name: value for name, value in vars(tfmq_fx).items() if name[0].isupper()}
    assert eval(repr(config), names) == config


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: WeightSpec(bits=1), r"WeightSpec.bits must be 2 to 8, got 1"),
        (lambda: WeightSpec(bits=9), r"WeightSpec.bits must be 2 to 8, got 9"),
        (lambda: WeightSpec(search=0), r"WeightSpec.search must be at least 1, got 0"),
        (lambda: ActivationSpec(bits=3), r"ActivationSpec.bits must be 4 to 8 or 16, got 3"),
        (lambda: LayerConfig(activations=ActivationSpec()), r"give weights=WeightSpec"),
        (lambda: TemporalSpec(mode="none"), r"TemporalSpec.mode must be one of .*got 'none'"),
        (lambda: TemporalSpec(cache_bits=()), r"cache_bits must be drawn from 4 and 8"),
        (lambda: TemporalSpec(cache_bits=(2,)), r"cache_bits must be drawn from 4 and 8"),
        (lambda: TemporalSpec(budget=-1), r"TemporalSpec.budget must be at least 0, got -1"),
        (lambda: TemporalSpec(tiar_iters=-1), r"tiar_iters must be at least 0, got -1"),
        (lambda: ReconstructionSpec(rounding="up"), r"rounding must be one of .*got 'up'"),
        (lambda: ReconstructionSpec(samples=0), r"samples must be at least 1, got 0"),
        (lambda: ReconstructionSpec(memory=0), r"memory must be at least 1, got 0"),
        (lambda: ReconstructionSpec(batch_size=0), r"batch_size must be at least 1, got 0"),
        (lambda: ReconstructionSpec(iters=-1), r"iters must be at least 0, got -1"),
        (lambda: ReconstructionSpec(damping=float("nan")), r"damping must be at least 0, got nan"),
        (lambda: ReconstructionSpec(rounds=1), r"rounds of resampling need round_iters"),
        (
            lambda: ReconstructionSpec(rounding="nearest", refine=2),
            r"refine improves second-order codes; rounding is 'nearest'",
        ),
        (lambda: ReconstructionSpec(sampling="odd"), r"sampling must be one of .*got 'odd'"),
        (lambda: ReconstructionSpec(center=2), r"center must be 0 to 1, got 2"),
        (lambda: WeightSpec(group_size=0), r"group_size must be at least 1, got 0"),
        (lambda: ActivationSpec(ranges="max"), r"ranges must be one of .*got 'max'"),
        (lambda: ActivationSpec(timestep_groups=0), r"timestep_groups must be at least 1, got 0"),
        (
            lambda: ActivationSpec(per_timestep=False, timestep_groups=4),
            r"timestep_groups contradicts per_timestep=False",
        ),
        (lambda: RewriteSpec(tcr=0.5), r"tcr must be at least 1, got 0.5"),
        (lambda: RewriteSpec(smooth=2), r"smooth must be 0 to 1, got 2"),
        (lambda: RewriteSpec(tcr=10, smooth=0.5), r"tcr and smooth both scale the input channels"),
        (lambda: RewriteSpec(rotate=12), r"rotate must be a power of two or None, got 12"),
        (lambda: RewriteSpec(low_rank=-1), r"low_rank must be at least 0, got -1"),
        (lambda: AttentionSpec(probabilities="log"), r"probabilities must be one of .*got 'log'"),
        (lambda: AttentionSpec(probabilities_bits=2), r"probabilities_bits must be 4 to 8 or 16"),
        (lambda: Config(correction="mean"), r"Config.correction must be one of .*got 'mean'"),
        (
            lambda: Config(
                name="x", layers=LayerConfig(weights=WeightSpec()), rewrites=RewriteSpec(smooth=1)
            ),
            r"Config 'x': rewrites.smooth make inputs .* layers.activations is None",
        ),
        (
            lambda: Config(rewrites=RewriteSpec(low_rank=4)),
            r"rewrites are of quantized layers, but layers.weights is None",
        ),
        (lambda: resolve("w4a8-w6a6"), r"unknown config 'w4a8-w6a6'.*take bits"),
        (lambda: resolve("best-w4a3"), r"ActivationSpec.bits must be 4 to 8 or 16, got 3"),
        (lambda: resolve("w2a2"), r"unknown config 'w2a2'; presets are fp, w8a8"),
        (lambda: WeightSpec(format="fp4"), r"WeightSpec.format must be one of .*got 'fp4'"),
        (lambda: WeightSpec(format="fp8", bits=4), r"WeightSpec: fp8 has 8 bits, got bits=4"),
        (lambda: WeightSpec(format="fp8", group_size=8), r"leave out group_size=8"),
        (lambda: ActivationSpec(format="e5m2"), r"ActivationSpec.format must be one of"),
        (lambda: ActivationSpec(format="fp8", bits=16), r"fp8 has 8 bits, got bits=16"),
        (lambda: ActivationSpec(format="fp8", ranges="mse"), r"use ranges='minmax'"),
        (lambda: ActivationSpec(dynamic=True, ranges="mse"), r"leave out timestep_groups and"),
        (lambda: ActivationSpec(dynamic=True, timestep_groups=2), r"leave out timestep_groups"),
        (
            lambda: LayerConfig(weights=WeightSpec(), activations=ActivationSpec(format="fp8")),
            r"must have the same format, got int and fp8",
        ),
        (
            lambda: AttentionSpec(activations=ActivationSpec(dynamic=True)),
            r"AttentionSpec.activations must be integers with calibrated ranges, got Activation",
        ),
        (lambda: AttentionSpec(activations=ActivationSpec(format="fp8")), r"must be integers"),
        (lambda: from_dict({"layer": {}}), r"Config: unknown keys \['layer'\]"),
        (
            lambda: from_dict({"layers": {"weights": {"bit": 4}}}),
            r"WeightSpec: unknown keys \['bit'\]",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_found(make, text):
    with pytest.raises(ConfigError, match=text) as caught:
        make()
    assert isinstance(caught.value, TfmqError)


def test_values_are_frozen_and_change_by_replace():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WeightSpec().bits = 4  # type: ignore[misc]
    with pytest.raises(ConfigError, match="got 40"):
        dataclasses.replace(WeightSpec(), bits=40)


@pytest.mark.parametrize(
    ("name", "weights", "acts", "first_acts"),
    [
        ("w8a8", 8, 8, 16),
        ("w4a8", 4, 8, 16),
        ("w8a16", 8, None, None),
        ("w4a16", 4, None, None),
    ],
)
def test_presets_are_what_their_names_say(name, weights, acts, first_acts):
    def bits(side):
        return None if side is None else side.bits

    recipe = resolve(name)
    assert recipe is PRESETS[name] and recipe.name == name
    assert (recipe.layers.weights.bits, bits(recipe.layers.activations)) == (weights, acts)
    assert (recipe.first.weights.bits, bits(recipe.first.activations)) == (8, first_acts)
    assert (recipe.last.weights.bits, bits(recipe.last.activations)) == (8, acts)


def test_dynamic_ranges_are_not_looked_up_from_t_and_not_calibrated():
    spec = ActivationSpec(dynamic=True)
    assert not spec.per_timestep and spec == ActivationSpec(dynamic=True, per_timestep=False)
    layer = LayerConfig(weights=WeightSpec(), activations=spec)
    assert layer.calibrated is None and LayerConfig().calibrated is None
    static = dataclasses.replace(spec, dynamic=False)
    assert dataclasses.replace(layer, activations=static).calibrated is static


@pytest.mark.parametrize(
    ("name", "format", "dynamic"),
    [("fp8", "fp8", False), ("w8a8-dynamic", "int", True), ("fp8-dynamic", "fp8", True)],
)
def test_presets_of_formats_keep_the_first_layer_as_w8a8_does(name, format, dynamic):
    recipe = resolve(name)
    assert recipe.name == name and from_dict(to_dict(recipe)) == recipe
    for layer in (recipe.layers, recipe.last):
        assert layer.weights.format == layer.activations.format == format
        assert layer.activations.dynamic == dynamic
        assert layer.activations.per_timestep == (not dynamic)
    first = recipe.first
    assert (first.weights, first.activations.bits) == (WeightSpec(bits=8), 16)
    assert (first.activations.format, first.activations.dynamic) == ("int", dynamic)
    assert recipe.reconstruction.rounding == ("nearest" if dynamic else "second-order")


def test_the_preset_without_quantization_keeps_exact_tables():
    recipe = resolve("fp")
    assert recipe.layers == LayerConfig() and recipe.first is None and recipe.last is None
    assert recipe.temporal.mode == "table"
