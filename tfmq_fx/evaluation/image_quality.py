"""Measure generated images: features from a classifier, FID, sFID, IS, precision and recall,
agreement, and distances image by image; and hold all figures of a model.

Features are those of a classifier trained on the same data, not of Inception: figures compare with
each other and with no other paper's. The Inception score is torchmetrics', which is imported when
first needed and comes with `pip install "tfmq_fx[evaluate]"`; Frechet distances are
`image_metrics.frechet_distance`; precision and recall are written out here.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError

from .digits import ImageClassifier
from .image_metrics import bootstrap_interval, confident_share, frechet_distance, psnr, ssim

SPATIAL_MAPS = 7  # of the last feature map, as many as Nash et al. 2021 take
_BATCH = 256
_SPLITS = 10  # of the Inception score, as usual
_NEIGHBOURS = 3  # of precision and recall, as in the paper


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeatures:
    """The features and logits of a classifier for n images.

    features: (n, d), of its last layer but one.  spatial: (n, 7 h w), the first 7 maps of its last
    feature map.  logits: (n, classes).
    """

    features: Tensor
    spatial: Tensor
    logits: Tensor


@torch.no_grad()
def extract_features(classifier: ImageClassifier, images: Tensor) -> ImageFeatures:
    """The features of images (n, channels, height, width) in [-1, 1], clamped to that.

    Raises ConfigError where a pixel is nan or infinite: no figure would mean anything.
    """
    broken = int((~images.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise ConfigError(f"{broken} of {len(images)} images hold nan or inf")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in images.clamp(-1, 1).split(_BATCH):
        maps = classifier.feature_map(batch)[:, :SPATIAL_MAPS].flatten(1)
        parts.append((classifier.features(batch), maps, classifier(batch)))
    features, spatial, logits = (torch.cat(each) for each in zip(*parts, strict=True))
    return ImageFeatures(features=features, spatial=spatial, logits=logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFigures:
    """Figures of generated images against reference images.

    fid, fid_low, fid_high: Frechet distance of features, with its 95 % bootstrap interval.
    sfid: Frechet distance of spatial features (Nash et al. 2021).
    inception_score: from the classifier's logits, the mean of ten splits; at most its classes.
    class_agreement: share that is given the class asked for; None where no class was.
    confident: share whose most probable class has more than 0.9.
    precision, recall: share of generated images within the references' manifold and of references
    within that of the generated ones (Kynkaanniemi et al. 2019).
    """

    fid: float
    fid_low: float
    fid_high: float
    sfid: float
    inception_score: float
    class_agreement: float | None
    confident: float
    precision: float
    recall: float


def image_figures(drawn: ImageFeatures, real: ImageFeatures, labels: Tensor | None) -> ImageFigures:
    """The figures of generated images against reference images, from the features of both.

    labels: (n,), the classes asked for.
    """
    low, high = bootstrap_interval(
        drawn.features, real.features, generator=torch.Generator().manual_seed(0)
    )
    agreement = None
    if labels is not None:
        agreement = float((drawn.logits.argmax(1) == labels).double().mean())
    precision, recall = precision_recall(drawn.features, real.features)
    return ImageFigures(
        fid=frechet_distance(drawn.features, real.features),
        fid_low=low,
        fid_high=high,
        sfid=frechet_distance(drawn.spatial, real.spatial),
        inception_score=inception_score(drawn.logits),
        class_agreement=agreement,
        confident=confident_share(drawn.logits),
        precision=precision,
        recall=recall,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """The distances to full precision's images of the same noise, means over all pairs.

    psnr: dB, inf as soon as one pair is equal.  ssim: at most 1.  feature_distance: norm of the
    difference of features over the norm of full precision's.
    """

    psnr: float
    ssim: float
    feature_distance: float


def pair_figures(
    expected: Tensor, drawn: Tensor, of_expected: ImageFeatures, of_drawn: ImageFeatures
) -> PairFigures:
    """The figures of images `drawn` against `expected`, both (n, channels, height, width) in
    [-1, 1], from these and their features."""
    apart = (of_expected.features - of_drawn.features).double().norm(dim=1)
    size = of_expected.features.double().norm(dim=1)
    similar = [ssim(a, b) for a, b in zip(expected.split(_BATCH), drawn.split(_BATCH), strict=True)]
    return PairFigures(
        psnr=float(psnr(expected, drawn).mean()),
        ssim=float(torch.cat(similar).mean()),
        feature_distance=float(torch.where(apart == 0, 0, apart / size).mean()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Everything measured on one model; what does not apply to full precision is None.

    images, pairs: see `ImageFigures` and `PairFigures`.
    sqnr, sqnr_pooled, sqnr_by_step: of its outputs in dB.
    temporal_mean, temporal_worst, temporal_by_step: relative error of temporal features, over all
    timesteps and at each.
    bytes: saved on disk.  weights, inputs: share that is quantized.
    quantize_seconds: from prepare to convert.  compile_seconds: of the first call.
    sample_seconds: of drawing all images.
    backend: the one that sampled.  backend_note: why it is not the chosen one.
    """

    images: ImageFigures
    pairs: PairFigures | None = None
    sqnr: float | None = None
    sqnr_pooled: float | None = None
    sqnr_by_step: list[float] | None = None
    temporal_mean: float | None = None
    temporal_worst: float | None = None
    temporal_by_step: list[float] | None = None
    bytes: int
    weights: float | None = None
    inputs: float | None = None
    quantize_seconds: float | None = None
    compile_seconds: float
    sample_seconds: float
    backend: str
    backend_note: str | None = None


def inception_score(logits: Tensor) -> float:
    """The Inception score from logits (n, c): exp of the mean divergence of each image's classes
    from those of all.

    The mean of ten splits of the images in random order, which is always the same one (Salimans et
    al. 2016, with another classifier than theirs). Raises ImportError without torchmetrics.
    """
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")  # it warns that it keeps all logits
        torch.manual_seed(0)  # the order is drawn from torch's own generator
        try:
            inception = importlib.import_module("torchmetrics.image.inception")
        except ImportError as error:
            error.add_note('an evaluation needs torchmetrics: pip install "tfmq_fx[evaluate]"')
            raise
        score = inception.InceptionScore(
            feature=torch.nn.Identity(), splits=min(_SPLITS, len(logits))
        )
        score.update(logits.double())
        return float(score.compute()[0])


def precision_recall(
    generated: Tensor, real: Tensor, *, neighbours: int = _NEIGHBOURS
) -> tuple[float, float]:
    """The precision and recall in [0, 1] of generated features (n, d) against real ones (m, d).

    A set's manifold is all that lies within reach of one of its members, which is the distance to
    its `neighbours`-th nearest other member. Precision is the share of generated features in the
    real manifold, recall that of real features in the generated one (Kynkaanniemi et al. 2019,
    equations 1 and 2). Both sets count alike: the first k = min(n, m) of each are taken. In
    float64. Raises ConfigError for k <= neighbours or other shapes.
    """
    if generated.dim() != 2 or real.dim() != 2 or generated.shape[1] != real.shape[1]:
        raise ConfigError(
            f"features must be (n, d) and (m, d), got {tuple(generated.shape)} and "
            f"{tuple(real.shape)}"
        )
    count = min(len(generated), len(real))
    if count <= neighbours:
        raise ConfigError(f"{neighbours} neighbours need more than {count} features")
    fake, true = generated[:count].double(), real[:count].double()
    return _covered(fake, true, neighbours), _covered(true, fake, neighbours)


def _covered(points: Tensor, members: Tensor, neighbours: int) -> float:
    """The share of `points` in the manifold of `members`."""
    reach = torch.cat(
        [
            # the nearest is the member itself
            torch.cdist(part, members).kthvalue(neighbours + 1, dim=1).values
            for part in members.split(1024)
        ]
    )
    inside = [(torch.cdist(part, members) <= reach).any(1) for part in points.split(1024)]
    return float(torch.cat(inside).double().mean())
