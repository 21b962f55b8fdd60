"""What rows say together: means, spreads, and differences of arms on the same seeds with their confidence intervals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.replicating.arms import BASELINE
from benchmarks.replicating.pieces import Row
from sgmim_fast.errors import UserError

F64 = NDArray[np.float64]
Interval = tuple[float, float]
Better = Literal["lower", "higher"]
LEVEL = 0.95


@dataclass(frozen=True)
class Metric:
    """One figure of one stage."""

    stage: str
    key: tuple[str, ...]
    """Where it is among a row's figures."""
    label: str
    better: Better

    def of(self, row: Mapping[str, Any]) -> float | None:
        """Its value in a row; None where that has none."""
        value: Any = row["figures"]
        for name in self.key:
            if name not in value:
                return None
            value = value[name]
        return float(value)


_DEPTH: tuple[tuple[str, str, Better], ...] = (
    ("rmse", "RMSE", "lower"),
    ("abs_rel", "AbsRel", "lower"),
    ("d1", "d1", "higher"),
    ("silog", "SILog", "lower"),
)
_SETS = (("", "unseen"), ("familiar ", "familiar"))
"""What stands before a figure's name, and how people call the set."""


def _metrics(stage: str, name: str, depth: tuple[str, ...], classes: tuple[str, ...]) -> tuple[Metric, ...]:
    """Of both sets, depth before classes."""
    found = [
        Metric(stage, (*depth, f"{before}{key}"), f"{name} depth {label}, {words}", better)
        for key, label, better in _DEPTH
        for before, words in _SETS
    ]
    found += [Metric(stage, (*classes, f"{before}mIoU"), f"{name} mIoU, {words}", "higher") for before, words in _SETS]
    return tuple(found)


FINETUNED = (*_metrics("depth", "fine-tuned", (), ())[:-2], *_metrics("segmentation", "fine-tuned", (), ())[-2:])
PROBED = (
    *_metrics("probe", "linear", ("depth",), ("segmentation",)),
    *_metrics("probe", "k-NN", ("knn-depth",), ("knn-segmentation",)),
)
FEATURELESS = tuple(
    metric
    for name, words in (("constant", "constant"), ("grid target", "truth on the grid"))
    for metric in _metrics("probe", words, (f"{name} depth",), (f"{name} segmentation",))
    if metric.label.split(",")[0].endswith(("RMSE", "mIoU"))
)


@dataclass(frozen=True)
class Difference:
    """An arm less the baseline, seed by seed."""

    mean: float
    interval: Interval | None
    """Student's, at ``LEVEL``; None of a single seed."""
    seeds: int


@dataclass(frozen=True)
class Summary:
    """One metric of one arm with one number of labels."""

    arm: str
    labels: int
    metric: Metric
    values: dict[int, float]
    """By seed."""
    difference: Difference | None
    """None of the baseline, and without a seed in common."""

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None of a single seed."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


def summarise(rows: Iterable[Row], metrics: Iterable[Metric], baseline: str = BASELINE) -> list[Summary]:
    """Every metric of every arm and number of labels in rows of one size and one rate.

    Raises:
        UserError: if two rows are about the same arm, seed and labels with different settings.
    """
    kept = list(rows)
    found = []
    for metric in metrics:
        values: dict[tuple[str, int], dict[int, float]] = {}
        for row in kept:
            if row["stage"] != metric.stage or (value := metric.of(row)) is None:
                continue
            seeds = values.setdefault((row["arm"], row["labels"]), {})
            if row["seed"] in seeds:
                raise UserError(
                    f"two rows are about {row['arm']}, seed {row['seed']}, {row['stage']}, {row['labels']} labels, and "
                    "their settings differ; keep rows of one version in the file"
                )
            seeds[row["seed"]] = value
        for (arm, labels), own in values.items():
            other = values.get((baseline, labels), {})
            found.append(Summary(arm, labels, metric, own, None if arm == baseline else paired_difference(own, other)))
    return found


def paired_difference(values: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """``values`` less ``other`` on the seeds that both have; None where there are none."""
    gaps = [values[seed] - other[seed] for seed in sorted(values.keys() & other.keys())]
    if not gaps:
        return None
    mean = fmean(gaps)
    if len(gaps) == 1:
        return Difference(mean, None, 1)
    reach = student_quantile(0.5 + LEVEL / 2, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean, (mean - reach, mean + reach), len(gaps))


def student_quantile(share: float, freedom: int) -> float:
    """Where the distribution function of Student's t with ``freedom`` degrees is ``share``, 0.5 to below 1."""
    low, high = 0.0, 1.0
    while _student_share(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _student_share(t: float, freedom: int) -> float:
    """Distribution function, by the finite series for whole degrees (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + within / 2


# -- the test images' share in it


def depth_figure(index: int) -> Callable[[F64], float]:
    """Mean over images of one of ``DEPTH_METRICS``, of sums an image (images, 11): the tenth counts the image."""
    return lambda images: float(images[:, index].sum() / images[:, -2].sum())


def mean_iou(images: F64) -> float:
    """mIoU of the pixels of images (images, classes, classes), as ``SegmentationMetrics`` has it."""
    counts = images.sum(0)
    hits = counts.diagonal()
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(hits / (counts.sum(0) + counts.sum(1) - hits)))


def bootstrap_difference(
    arms: Sequence[F64], others: Sequence[F64], figure: Callable[[F64], float], draws: int = 1000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean difference over seeds when test images are drawn anew, the same for both.

    It says how much depends on which images were tested, not on which seed was trained.

    Args:
        arms: of each seed, values of every test image, the images along the first axis.
        others: of the baseline, the same seeds and images.
        figure: what is made of the values of some images.
        draws: how many sets of images.
        seed: draws them.
    """
    rng = np.random.default_rng(seed)
    count = len(arms[0])
    gaps = []
    for _ in range(draws):
        drawn = rng.integers(count, size=count)
        gaps.append(fmean(figure(a[drawn]) - figure(b[drawn]) for a, b in zip(arms, others, strict=True)))
    low, high = np.quantile(gaps, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
