"""baselines: recipes by name and bits, and how many steps they learn for."""

from __future__ import annotations

import dataclasses

import pytest

from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.presets import RECIPES, resolve
from tfmq_fx.evaluation.recipes import BITS, NAMES, PUBLISHED, baselines, capped, nearest, recipe


def test_every_published_recipe_and_ours_is_there_at_every_width():
    assert set(NAMES) == {"nearest", *RECIPES, "mixed"}
    assert NAMES[0] == "nearest" and NAMES[-2:] == ("best", "mixed")
    found = baselines(None, None, PUBLISHED)
    assert [(b.name, b.bits) for b in found] == [(n, w) for w in BITS for n in NAMES]
    short = baselines(None, None, 100)
    learning = {b.name for b, few in zip(found, short, strict=True) if b.config != few.config}
    assert learning == {"brecq", "q-diffusion", "ptqd", "tfmq", "tfmq-cache", "tcaq"}


def test_recipes_are_the_presets_and_configs_are_themselves():
    own = Config(name="own")
    found = baselines(["tfmq", own, "nearest"], ["w6a6"], PUBLISHED)
    assert [b.config for b in found] == [resolve("tfmq-w6a6"), nearest("w6a6"), own]
    assert [b.bits for b in found] == ["w6a6", "w6a6", ""]


def test_nearest_learns_nothing_and_has_static_ranges():
    made = nearest("w4a8")
    assert made.reconstruction.iters == 0 and made.temporal.tiar_iters == 0
    assert made.layers.weights.bits == 4 and not made.layers.activations.per_timestep
    assert made.name == "nearest-w4a8"


@pytest.mark.parametrize(
    ("names", "bits", "message"),
    [
        (["brecc"], ["w4a8"], "unknown recipe 'brecc'; there are nearest, brecq"),
        (["best"], ["4/8"], "bits are written as in 'w4a8', got '4/8'"),
        (["best"], ["w9a8"], "WeightSpec.bits must be 2 to 8, got 9"),
        (["best", "best"], ["w4a8"], "each recipe and each width once"),
        ([], None, "at least one"),
    ],
)
def test_what_is_not_known_is_refused(names, bits, message):
    with pytest.raises(ConfigError, match=message):
        baselines(names, bits, 100)


def test_a_cap_takes_the_step_size_that_suits_few_steps():
    released = recipe("tfmq", "w4a8")
    assert capped(released, 20_000) is released
    short = capped(released, 100)
    assert short.reconstruction.iters == 100 and short.reconstruction.samples == 1280
    assert short.reconstruction.learning_rate == 3e-2 != released.reconstruction.learning_rate
    assert short.temporal.tiar_iters == 1000
    assert capped(released, 5000).temporal.tiar_iters == 5000
    rounds = capped(recipe("tcaq", "w6a6"), 100).reconstruction
    assert (rounds.rounds, rounds.round_iters) == (2, 25)
    kept = dataclasses.replace(
        short, reconstruction=released.reconstruction, temporal=released.temporal
    )
    assert kept == released


def test_a_number_caps_every_recipe_and_published_none():
    own = dataclasses.replace(recipe("brecq", "w4a8"), name="own")
    given = ["tfmq", "best", own]
    released = [recipe("tfmq", "w4a8"), recipe("best", "w4a8"), own]
    assert [b.config for b in baselines(given, ["w4a8"], PUBLISHED)] == released
    assert [b.config for b in baselines(given, ["w4a8"], 200)] == [capped(c, 200) for c in released]
    assert capped(released[1], 1) is released[1]  # it learns nothing


@pytest.mark.parametrize("wrong", ["slow", "equal-time", "200", 0, -1, True, 1.5, None])
def test_other_rules_of_learning_are_refused(wrong):
    with pytest.raises(ConfigError, match="learning must be 'published' or a whole number of"):
        baselines(None, None, wrong)
