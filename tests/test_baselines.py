"""baselines: recipes by name and bits, and how many steps they learn for."""

from __future__ import annotations

import dataclasses

import pytest

from tfmq_fx.baselines import BITS, NAMES, baselines, capped, learning_rule, nearest, recipe
from tfmq_fx.config import Config
from tfmq_fx.errors import ConfigError
from tfmq_fx.presets import RECIPES, resolve


def test_every_published_recipe_and_ours_is_there_at_every_width():
    assert set(NAMES) == {"nearest", *RECIPES, "mixed"}
    assert NAMES[0] == "nearest" and NAMES[-2:] == ("best", "mixed")
    found = baselines(None, None)
    assert [(b.name, b.bits) for b in found] == [(n, w) for w in BITS for n in NAMES]
    learning = {b.name for b in found if b.learns}
    assert learning == {"brecq", "q-diffusion", "ptqd", "tfmq", "tfmq-cache", "tcaq"}


def test_recipes_are_the_presets_and_configs_are_themselves():
    own = Config(name="own")
    found = baselines(["tfmq", own, "nearest"], ["w6a6"])
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
        baselines(names, bits)


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


def test_learning_rules():
    assert learning_rule("published") == "published" and learning_rule("equal-time") == "equal-time"
    assert learning_rule("200") == learning_rule(200) == 200
    for wrong in ("slow", "0", -1, True):
        with pytest.raises(ConfigError, match="learning must be 'published', 'equal-time' or"):
            learning_rule(wrong)
