"""Fitting probes on the features of some images, and scoring them on others.

DINOv2 (arXiv 2304.07193) trains its linear depth and segmentation layers by gradient descent, depth as a mean of bins;
what comes out depends on learning rate, schedule and batch. Here every probe is the one solution of a problem that has
one: least squares of log depth in closed form, a convex classifier at its minimum, a search that is exact. So nothing
is tuned but the strength of the penalty, on held-out training images, and two runs of the same weights agree.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sgmim_fast.data.dense.evaluation import EvaluationSample, evaluation_samples
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.errors import UserError
from sgmim_fast.probing.data import Kind, ProbeSplits, names_sha256
from sgmim_fast.probing.features import Features
from sgmim_fast.probing.grid import grid_of, to_pixels, tokens_of
from sgmim_fast.probing.logistic import choose_logistic
from sgmim_fast.probing.neighbours import Neighbours
from sgmim_fast.probing.ridge import Moments, choose_ridge
from sgmim_fast.probing.settings import Probe, ProbeSettings
from sgmim_fast.probing.targets import best_on_grid

CONSTANT = "constant"
"""Says of every token what the training tokens have on average."""
GRID_TARGET = "grid target"
"""Says of every token its true target: what the coarseness of the grid and upsampling cost."""

Progress = Callable[[str, int, int], None]
"""Told what is done, how many of how many images."""


class Predictor(Protocol):
    """A fitted probe."""

    def predict(self, tokens: Tensor) -> Tensor:
        """(N, T) float64 of (N, C)."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe, or one of the two predictors that need no features, came to."""

    probe: str
    """A ``Probe``, ``CONSTANT`` or ``GRID_TARGET``."""
    kind: Kind
    figures: dict[str, float]
    """By the names of the metrics."""
    chosen: dict[str, float] = field(default_factory=dict)
    """The strength of the penalty, and the held-out error that it was chosen by."""
    seconds: float = 0.0
    """Of solving, predicting and scoring, without the features and the pass over the training images."""


@dataclass(frozen=True)
class ProbeReport:
    """All results on images with one kind of target."""

    results: tuple[ProbeResult, ...]
    train_images: int
    val_images: int
    train_tokens: int
    """With a target, of all training images."""
    kept_tokens: int
    """Of those, the ones for nearest neighbours and the classifier."""
    train_sha256: str
    """Of the names of the training images."""
    val_sha256: str

    def __getitem__(self, probe: str) -> ProbeResult:
        return next(result for result in self.results if result.probe == probe)


class Tokens(NamedTuple):
    """Training tokens that have been drawn."""

    features: Tensor
    """(N, C) float32."""
    values: Tensor
    """(N, T) float32."""
    weight: Tensor
    """(N,) float32, positive."""
    fold: Tensor
    """(N,) int64."""


class _Trained(NamedTuple):
    moments: list[Moments]
    tokens: Tokens
    mean: Tensor
    """(T,) float64: the targets' weighted mean over all training tokens."""
    total: int
    """Training tokens with a target."""


def run_probes(
    features: Features,
    splits: ProbeSplits,
    probes: Sequence[Probe],
    settings: ProbeSettings,
    progress: Progress = lambda what, done, total: None,
) -> ProbeReport:
    """Fit on training images, score on others.

    Args:
        features: of what is probed; those of images it knows already are not computed again.
        splits: the images.
        probes: those of the splits' kind.
        settings: how many images, and the probes' own.
        progress: told of images.

    Raises:
        UserError: if there are too few images or targets, or features are not finite.
    """
    if strange := [probe for probe in probes if _kind(probe) != splits.kind]:
        raise UserError(f"probe {strange[0]} does not go with images that have targets for {splits.kind}")
    train, val = splits.chosen(settings)
    trained = _read_training(features, splits, train, "depth" in probes, settings, progress)
    predictors: dict[str, tuple[Predictor, dict[str, float]]] = {}
    seconds = dict.fromkeys((*probes, CONSTANT, GRID_TARGET), 0.0)
    for probe in dict.fromkeys(probes):
        began = time.perf_counter()
        progress(f"fitting {probe}", 0, 1)
        predictors[probe] = _fit(probe, trained, settings)
        progress(f"fitting {probe}", 1, 1)
        seconds[probe] += time.perf_counter() - began
    figures = _score(
        features,
        splits,
        val,
        {name: fitted for name, (fitted, _) in predictors.items()},
        trained.mean,
        seconds,
        progress,
    )
    results = tuple(
        ProbeResult(name, splits.kind, found, predictors[name][1] if name in predictors else {}, seconds[name])
        for name, found in figures.items()
    )
    return ProbeReport(
        results,
        len(train),
        len(val),
        trained.total,
        len(trained.tokens.features),
        names_sha256(splits.train, train),
        names_sha256(splits.val, val),
    )


def _kind(probe: Probe) -> Kind:
    return "depth" if probe in ("depth", "knn-depth") else "segmentation"


def _image_features(features: Features, samples: DenseSamples, sample: EvaluationSample) -> Tensor:
    return features.of(samples.members(sample.index)[0].name, sample.image)


def _read_training(
    features: Features,
    splits: ProbeSplits,
    indices: Sequence[int],
    with_moments: bool,
    settings: ProbeSettings,
    progress: Progress,
) -> _Trained:
    """One pass over the training images."""
    folds = min(settings.folds, len(indices))
    moments: list[Moments] = []
    drawn: list[Tokens] = []
    total, weights, count, with_target = torch.zeros(splits.target.size, dtype=torch.float64), 0.0, 0, 0
    what = f"training images ({splits.kind})"
    progress(what, 0, len(indices))
    for place, sample in enumerate(evaluation_samples(splits.train, indices)):
        x = tokens_of(_image_features(features, splits.train, sample))
        cells = splits.target.cells(sample, features.stride)
        y, weight = tokens_of(cells.values), cells.weight.flatten()
        known = weight.nonzero()[:, 0]
        fold = with_target % folds  # so that two images with a target are never in one fold while others are empty
        if with_moments:
            if not moments:
                moments = [Moments(x.double().mean(0), splits.target.size) for _ in range(folds)]
            moments[fold].update(x, y, weight)
        total += (weight.double()[:, None] * y.double()).sum(0)
        weights += float(weight.double().sum())
        count, with_target = count + len(known), with_target + bool(len(known))
        quota = settings.tokens // len(indices) + (place < settings.tokens % len(indices))
        order = np.random.default_rng((settings.seed, sample.index)).permutation(len(known))[:quota]
        kept = known[torch.from_numpy(np.sort(order))]
        drawn.append(Tokens(x[kept], y[kept], weight[kept], torch.full((len(kept),), fold)))
        progress(what, place + 1, len(indices))
    if with_target < 2:
        raise UserError(
            f"{with_target} of {len(indices)} training images has a pixel with a target, and probes need two "
            f"({splits.train.describe()}); take more images"
        )
    tokens = Tokens(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
    return _Trained(moments, tokens, total / weights, count)


def _fit(probe: str, trained: _Trained, settings: ProbeSettings) -> tuple[Predictor, dict[str, float]]:
    tokens = trained.tokens
    if probe == "depth":
        ridge = choose_ridge(trained.moments)
        return ridge.layer, {"strength": ridge.strength, "held_out_squared_error": ridge.error}
    if probe == "segmentation":
        logistic = choose_logistic(tokens.features, tokens.values, tokens.weight, tokens.fold)
        return logistic.layer, {"strength": logistic.strength, "held_out_cross_entropy": logistic.entropy}
    return Neighbours(tokens.features, tokens.values, settings.neighbours, settings.temperature), {}


def _score(
    features: Features,
    splits: ProbeSplits,
    indices: Sequence[int],
    predictors: dict[str, Predictor],
    mean: Tensor,
    seconds: dict[str, float],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """One pass over the images that are scored."""
    scores = {name: splits.target.scores() for name in (*predictors, CONSTANT, GRID_TARGET)}
    what = f"scored images ({splits.kind})"
    progress(what, 0, len(indices))
    for place, sample in enumerate(evaluation_samples(splits.val, indices)):
        found = _image_features(features, splits.val, sample)
        image = (sample.image.shape[-2], sample.image.shape[-1])
        size = (sample.target.shape[-2], sample.target.shape[-1])
        for name, predictor in predictors.items():
            began = time.perf_counter()
            prediction = grid_of(predictor.predict(tokens_of(found)), found.shape).float()
            scores[name].update(to_pixels(prediction, features.stride, image, size), sample)
            seconds[name] += time.perf_counter() - began
        scores[CONSTANT].update(mean.float()[:, None, None].expand(-1, *size), sample)
        cells = splits.target.cells(sample, features.stride)
        scores[GRID_TARGET].update(best_on_grid(cells, features.stride, image, size), sample)
        progress(what, place + 1, len(indices))
    return {name: score.compute() for name, score in scores.items()}
