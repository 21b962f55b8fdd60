"""Segmentation metrics against plain loops, mmsegmentation's rule for absent classes, and several ranks."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sgmim_fast import UserError
from sgmim_fast.tasks.segmentation_metrics import SegmentationMetrics

Labels = NDArray[np.int64]


def looped(prediction: Labels, label: Labels, classes: int) -> dict[str, float]:
    """Pixel by pixel; classes without union, or without labels, have no value and do not enter the means."""
    hits, predicted, labelled = ([0] * classes for _ in range(3))
    for p, t in zip(prediction.ravel().tolist(), label.ravel().tolist(), strict=True):
        if t == 255:
            continue
        predicted[p] += 1
        labelled[t] += 1
        hits[t] += p == t
    unions = [p + t - h for p, t, h in zip(predicted, labelled, hits, strict=True)]
    ious = [h / u for h, u in zip(hits, unions, strict=True) if u]
    accuracies = [h / t for h, t in zip(hits, labelled, strict=True) if t]
    return {
        "mIoU": sum(ious) / len(ious),
        "mAcc": sum(accuracies) / len(accuracies),
        "aAcc": sum(hits) / sum(labelled),
    }


def maps(classes: int, present: int, seed: int = 0) -> tuple[Labels, Labels]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, present, (4, 13, 17))
    prediction = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, classes, label.shape))
    label[rng.random(label.shape) < 0.2] = 255
    return prediction, label


@pytest.mark.parametrize(("classes", "present"), [(5, 5), (7, 3), (150, 40)])
def test_as_loops_do_it(classes: int, present: int) -> None:
    prediction, label = maps(classes, present)
    metrics = SegmentationMetrics(classes)
    for part in (slice(0, 1), slice(1, 4)):
        metrics.update(torch.from_numpy(prediction[part]), torch.from_numpy(label[part]))
    assert metrics.compute() == pytest.approx(looped(prediction, label, classes), rel=1e-12)


def test_by_hand() -> None:
    """Class 0: 1 of 2 right; class 1: right, and taken for it once more; class 2: only predicted; class 3: nowhere."""
    metrics = SegmentationMetrics(4)
    metrics.update(torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 0, 1, 255]]]))
    assert metrics.compute() == pytest.approx({"mIoU": (1 / 2 + 1 / 2) / 2, "mAcc": 3 / 4, "aAcc": 2 / 3})
    metrics.update(torch.tensor([[[2]]]), torch.tensor([[[0]]]))
    assert metrics.compute() == pytest.approx({"mIoU": (1 / 3 + 1 / 2 + 0) / 3, "mAcc": (1 / 3 + 1) / 2, "aAcc": 2 / 4})
    iou, accuracy = metrics.class_iou().tolist(), metrics.class_accuracy().tolist()
    assert iou[:3] == pytest.approx([1 / 3, 1 / 2, 0])
    assert [math.isnan(value) for value in (iou[3], accuracy[2], accuracy[3])] == [True] * 3


def test_scores_are_taken_at_their_largest() -> None:
    scores = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 5, (2, 6, 7), generator=torch.Generator().manual_seed(1))
    by_score, by_class = SegmentationMetrics(5), SegmentationMetrics(5)
    by_score.update(scores, label)
    by_class.update(scores.argmax(1), label)
    assert torch.equal(by_score.state, by_class.state)


def test_ignored_image_changes_nothing() -> None:
    metrics = SegmentationMetrics(3)
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 255))
    with pytest.raises(UserError, match="every pixel has label 255"):
        metrics.compute()
    metrics.update(torch.tensor([[[1]]]), torch.tensor([[[1]]]))
    assert metrics.compute() == {"mIoU": 1.0, "mAcc": 1.0, "aAcc": 1.0}


def test_ranks_add_up() -> None:
    prediction, label = (torch.from_numpy(array) for array in maps(6, 4, seed=2))
    whole, *ranks = (SegmentationMetrics(6) for _ in range(3))
    whole.update(prediction, label)
    for number in range(4):
        ranks[number % 2].update(prediction[number : number + 1], label[number : number + 1])
    ranks[0].state += ranks[1].state
    assert ranks[0].compute() == whole.compute()


@pytest.mark.parametrize("wrong", [5, -1, 254])
def test_label_that_is_no_class_is_an_error(wrong: int) -> None:
    label = torch.tensor([[[0, wrong, 255]]])
    with pytest.raises(UserError, match=r"labels range from .* segmentation.classes 5 allows 0 to 4 and 255"):
        SegmentationMetrics(5).update(torch.zeros(1, 1, 3, dtype=torch.int64), label)


@pytest.mark.parametrize("wrong", [5, -1, 255])
def test_prediction_that_is_no_class_is_an_error(wrong: int) -> None:
    prediction = torch.tensor([[[0, wrong, 4]]])
    metrics = SegmentationMetrics(5)
    with pytest.raises(UserError, match=r"predictions range from .* segmentation.classes 5 allows 0 to 4; "):
        metrics.update(prediction, torch.tensor([[[1, 1, 255]]]))
    assert not metrics.state.any()


def test_scores_of_other_classes_and_of_no_numbers_are_errors() -> None:
    label = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(UserError, match=r"scores are of 7 classes, and segmentation.classes is 5"):
        SegmentationMetrics(5).update(torch.zeros(1, 7, 2, 2), label)
    scores = torch.zeros(1, 5, 2, 2)
    scores[0, 3, 1, 1] = float("nan")
    with pytest.raises(UserError, match="hold values that are not numbers"):
        SegmentationMetrics(5).update(scores, label)


def test_other_shape_is_an_error() -> None:
    with pytest.raises(UserError, match=r"predicted as \(1, 2, 2\) and labelled as \(1, 2, 3\)"):
        SegmentationMetrics(5).update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.int64))
