"""figures: each against a value that was found another way."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from tests.subjects import classifier, images
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation import image_metrics
from tfmq_fx.evaluation.image_metrics import ssim
from tfmq_fx.evaluation.image_quality import (
    extract_features,
    image_figures,
    inception_score,
    pair_figures,
    precision_recall,
)


def test_a_classifier_is_read_at_three_depths():
    given = images(20) * 1.5  # beyond [-1, 1]
    judge = classifier()
    seen = extract_features(judge, given)
    with torch.no_grad():
        inside = given.clamp(-1, 1)
        torch.testing.assert_close(seen.features, judge.features(inside))
        torch.testing.assert_close(seen.logits, judge(inside))
        maps = judge.body[:8](inside)  # two convolutions a stage, each with its nonlinearity
    assert maps.shape == (20, 8, 2, 2) and seen.spatial.shape == (20, 7 * 2 * 2)
    torch.testing.assert_close(seen.spatial, maps[:, :7].flatten(1))


def test_images_that_are_broken_are_counted():
    given = images(4)
    given[1, 0, 0, 0], given[3, 0, 0, 0] = math.nan, math.inf
    with pytest.raises(ConfigError, match="2 of 4 images hold nan or inf"):
        extract_features(classifier(), given)


def test_inception_score_by_hand():
    sure = torch.full((4, 4), -20.0).fill_diagonal_(20.0)
    assert inception_score(torch.zeros(40, 10)) == pytest.approx(1)  # no idea of any
    assert inception_score(sure[:1].repeat(40, 1)) == pytest.approx(1)  # always the same class
    assert inception_score(sure) == pytest.approx(1)  # a split of one image knows one class
    assert inception_score(sure.repeat(2500, 1)) == pytest.approx(4, rel=1e-2)  # all four, sure
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]]).repeat(5000, 1)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    # a split of 1,000 has each kind 500 times, more or less: that changes the score by less
    assert inception_score(logits) == pytest.approx(math.exp(divergence), rel=3e-3)


def test_inception_score_leaves_the_random_state_alone():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert inception_score(logits) == inception_score(logits)
    assert torch.equal(torch.get_rng_state(), before)


def test_inception_score_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.inception", None)
    with pytest.raises(ImportError) as caught:
        inception_score(torch.zeros(4, 2))
    assert caught.value.__notes__ == [
        'an evaluation needs torchmetrics: pip install "tfmq_fx[evaluate]"'
    ]


def test_precision_and_recall_on_a_line():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    generated = torch.tensor([[0.5], [2.5], [9.0], [9.5]])
    # with one neighbour each real point reaches 1 far, the generated 2, 2, 0.5 and 0.5
    assert precision_recall(generated, real, neighbours=1) == (0.5, 1.0)
    assert precision_recall(real, generated, neighbours=1) == (1.0, 0.5)
    assert precision_recall(real, real, neighbours=1) == (1.0, 1.0)
    assert precision_recall(real + 100, real, neighbours=1) == (0.0, 0.0)


def test_precision_and_recall_against_another_search_of_neighbours():
    generator = torch.Generator().manual_seed(0)
    generated = 1.3 * torch.randn(90, 4, generator=generator) + 0.3
    real = torch.randn(70, 4, generator=generator)
    fake, true = generated[:70].double().numpy(), real.double().numpy()

    def covered(points, members):
        reach = NearestNeighbors(n_neighbors=4).fit(members).kneighbors(members)[0][:, 3]
        apart = np.linalg.norm(points[:, None] - members[None], axis=2)
        return (apart <= reach).any(1).mean()

    expected = (covered(fake, true), covered(true, fake))
    assert precision_recall(generated, real) == pytest.approx(expected)
    assert 0.3 < expected[0] < expected[1]


@pytest.mark.parametrize(
    ("generated", "real", "message"),
    [
        ((3, 2), (9, 2), "3 neighbours need more than 3 features"),
        ((9, 2), (9, 3), r"must be \(n, d\) and \(m, d\), got \(9, 2\) and \(9, 3\)"),
        ((9,), (9, 2), "must be"),
    ],
)
def test_precision_and_recall_refuse_what_they_cannot_compare(generated, real, message):
    with pytest.raises(ConfigError, match=message):
        precision_recall(torch.zeros(generated), torch.zeros(real))


def test_figures_of_images_are_those_of_their_features():
    real, seen = (
        extract_features(classifier(), images(40)),
        extract_features(classifier(), images(60)[20:] * 0.8),
    )
    labels = seen.logits.argmax(1).clone()
    labels[:10] = (labels[:10] + 1) % 10
    found = image_figures(seen, real, labels)
    assert found.fid == image_metrics.frechet_distance(seen.features, real.features)
    assert found.sfid == image_metrics.frechet_distance(seen.spatial, real.spatial)
    assert 0 <= found.fid_low < found.fid < found.fid_high
    assert found.class_agreement == 0.75
    assert found.confident == image_metrics.confident_share(seen.logits)
    assert (found.precision, found.recall) == precision_recall(seen.features, real.features)
    assert image_figures(seen, real, None).class_agreement is None


def test_figures_of_pairs_are_means_over_the_pairs():
    expected = images(12) * 0.5
    found = expected.clone()
    found[:6] += 0.02
    found[6:] -= 0.2
    seen = [extract_features(classifier(), each) for each in (expected, found)]
    pairs = pair_figures(expected, found, *seen)
    assert pairs.psnr == pytest.approx((20 * math.log10(2 / 0.02) + 20 * math.log10(2 / 0.2)) / 2)
    assert pairs.ssim == pytest.approx(float(ssim(expected, found).mean()))
    a, b = (each.features.double() for each in seen)
    apart = ((a - b).square().sum(1) / a.square().sum(1)).sqrt().mean()
    assert pairs.feature_distance == pytest.approx(float(apart))
    same = pair_figures(expected, expected, seen[0], seen[0])
    assert (same.psnr, same.ssim, same.feature_distance) == (math.inf, 1.0, 0.0)
