"""suite: the shipped models fit together, names are found, contents are told apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.subjects import denoiser, tiny_subject
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation.subjects import SUBJECTS, as_function, contents, find_subjects


def test_what_ships_is_found_by_name_and_subjects_are_themselves():
    assert list(SUBJECTS) == ["digits", "glyphs-dit", "glyphs-unet"]
    assert find_subjects(None) == list(SUBJECTS.values())
    own = tiny_subject()
    assert find_subjects(["glyphs-dit", own]) == [SUBJECTS["glyphs-dit"], own]
    assert find_subjects("digits") == [SUBJECTS["digits"]]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["cats"], "unknown model 'cats'; there are digits, glyphs-dit, glyphs-unet"),
        ([], "at least one; got none"),
        (["digits", "digits"], "each model once"),
    ],
)
def test_other_models_are_refused(models, message):
    with pytest.raises(ConfigError, match=message):
        find_subjects(models)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_shipped_model_takes_its_example_and_its_classifier_takes_what_it_draws(name):
    subject = SUBJECTS[name]
    example = subject.example()
    model, classifier = subject.load(), subject.classifier()
    with torch.no_grad():
        drawn = model(**example).sample
        same = as_function(model)(
            example[subject.sample_name], torch.tensor(1), **subject.conditions(2)
        )
        assert drawn.shape == (2, *subject.shape) and torch.equal(drawn, same)
        assert classifier(drawn).shape == (2, 10)
        assert classifier.feature_map(drawn).shape == (2, 64, 4, 4)
    assert subject.scheduler().config.num_train_timesteps == 1000


def test_the_digits_are_judged_against_the_images_that_are_named():
    images = SUBJECTS["digits"].images()
    assert len(images) == 1497 and "1,497" in SUBJECTS["digits"].reference


def test_classes_are_asked_for_in_turn():
    labels = tiny_subject().conditions(12)["class_labels"]
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert tiny_subject(classes=None).conditions(12) == {}


def test_contents_tell_weights_apart():
    one, other = denoiser(), denoiser(2.0)
    assert contents(one) == contents(denoiser())
    assert len({contents(one), contents(other), contents(one, other), contents(other, one)}) == 4


def test_subjects_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_subject().name = "other"
