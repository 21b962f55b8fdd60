"""Depth metrics against plain loops and numbers worked out by hand; crops, clamping, empty images, several ranks."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sgmim_fast import UserError
from sgmim_fast.config import DepthCrop
from sgmim_fast.tasks.depth_metrics import DEPTH_METRICS, DepthMetrics, crop_slices

Array = NDArray[np.float64]


def looped(prediction: Array, target: Array, low: float, high: float, mask: NDArray[np.bool_]) -> dict[str, float]:
    """One image, pixel by pixel in Python floats."""
    sums = dict.fromkeys(DEPTH_METRICS, 0.0)
    logs = []
    for (row, column), t in np.ndenumerate(target):
        if not (mask[row, column] and low < t < high):
            continue
        p = float(prediction[row, column])
        p = low if math.isnan(p) else min(max(p, low), high)
        for number in (1, 2, 3):
            sums[f"d{number}"] += max(p / t, t / p) < 1.25**number
        sums["abs_rel"] += abs(p - t) / t
        sums["sq_rel"] += (p - t) ** 2 / t
        sums["rmse"] += (p - t) ** 2
        sums["rmse_log"] += (math.log(p) - math.log(t)) ** 2
        sums["log10"] += abs(math.log10(p) - math.log10(t))
        logs.append(math.log(p) - math.log(t))
    found = {name: value / len(logs) for name, value in sums.items()}
    found["rmse"], found["rmse_log"] = math.sqrt(found["rmse"]), math.sqrt(found["rmse_log"])
    mean = sum(logs) / len(logs)
    found["silog"] = 100 * math.sqrt(sum(log * log for log in logs) / len(logs) - mean * mean)
    return found


def images(size: tuple[int, int], batch: int, seed: int = 0) -> tuple[Array, Array]:
    """Predictions with all that can go wrong in them, and targets with holes and depths out of range."""
    rng = np.random.default_rng(seed)
    target = rng.uniform(0.5, 12, (batch, 1, *size))
    target[rng.random(target.shape) < 0.4] = 0
    prediction = target * rng.lognormal(0, 0.3, target.shape) + 0.01
    for value in (np.nan, np.inf, -np.inf, 0.0, -1.0):
        prediction[rng.random(target.shape) < 0.01] = value
    return prediction, target


@pytest.mark.parametrize("crop", ["none", "garg", "eigen"])
def test_as_loops_do_it(crop: DepthCrop) -> None:
    size = (37, 53)
    fractions = {"none": (0, 1, 0, 1), "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229)}
    fractions["eigen"] = (0.3324324, 0.91351351, 0.0359477, 0.96405229)
    top, bottom, left, right = fractions[crop]
    mask = np.zeros(size, dtype=bool)
    mask[int(top * size[0]) : int(bottom * size[0]), int(left * size[1]) : int(right * size[1])] = True
    prediction, target = images(size, batch=3)
    metrics = DepthMetrics(1e-3, 10.0, crop)
    metrics.update(torch.from_numpy(prediction), torch.from_numpy(target))
    each = [looped(p[0], t[0], 1e-3, 10.0, mask) for p, t in zip(prediction, target, strict=True)]
    expected = {name: sum(image[name] for image in each) / 3 for name in DEPTH_METRICS}
    assert metrics.compute() == pytest.approx(expected, rel=1e-9)
    assert (metrics.images, metrics.skipped) == (3, 0)


def test_by_hand() -> None:
    """Two pixels, 2 and 4 metres, taken for 1 and 4: ratios 2 and 1, logarithmic errors -ln 2 and 0."""
    metrics = DepthMetrics(0.1, 10.0)
    metrics.update(torch.tensor([[[[1.0, 4.0, 7.0]]]]), torch.tensor([[[[2.0, 4.0, 0.0]]]]))
    expected = {
        "d1": 0.5,
        "d2": 0.5,
        "d3": 0.5,
        "abs_rel": 0.25,
        "sq_rel": 0.25,
        "rmse": math.sqrt(0.5),
        "rmse_log": math.log(2) / math.sqrt(2),
        "log10": math.log10(2) / 2,
        "silog": 50 * math.log(2),
    }
    assert metrics.compute() == pytest.approx(expected, rel=1e-12)


def test_thresholds_are_not_reached() -> None:
    """1.25 times the target is no longer within 1.25 of it, and a target at the limit is not valid."""
    metrics = DepthMetrics(1.0, 8.0)
    metrics.update(torch.tensor([[[[5.0, 3.0, 3.0]]]]), torch.tensor([[[[4.0, 1.0, 8.0]]]]))
    found = metrics.compute()
    assert (found["d1"], found["d2"]) == (0.0, 1.0)
    assert found["abs_rel"] == 0.25


@pytest.mark.parametrize(
    ("predicted", "counted"),
    [(0.0, 0.5), (-3.0, 0.5), (torch.nan, 0.5), (torch.inf, 8.0), (9.0, 8.0), (-torch.inf, 0.5)],
)
def test_predictions_are_brought_into_range(predicted: float, counted: float) -> None:
    """A single pixel of 2 metres."""
    metrics = DepthMetrics(0.5, 8.0)
    metrics.update(torch.full((1, 1, 1, 1), predicted), torch.full((1, 1, 1, 1), 2.0))
    found = metrics.compute()
    assert found["rmse"] == pytest.approx(abs(counted - 2))
    assert found["rmse_log"] == pytest.approx(math.log(4))
    assert found["silog"] == 0.0
    assert all(math.isfinite(value) for value in found.values())


def test_images_count_alike_however_many_pixels_they_have() -> None:
    metrics = DepthMetrics(0.1, 10.0)
    target = torch.zeros(2, 1, 4, 4)
    target[0], target[1, 0, 0, 0] = 1.0, 1.0
    prediction = torch.ones(2, 1, 4, 4)
    prediction[1] = 3.0
    metrics.update(prediction, target)
    assert metrics.compute()["abs_rel"] == 1.0


def test_image_without_valid_pixel_is_skipped_and_counted() -> None:
    metrics = DepthMetrics(0.1, 10.0)
    target = torch.stack((torch.zeros(1, 3, 3), torch.full((1, 3, 3), 2.0), torch.full((1, 3, 3), 11.0)))
    metrics.update(torch.ones(3, 1, 3, 3), target)
    assert (metrics.images, metrics.skipped) == (1, 2)
    assert metrics.compute()["abs_rel"] == 0.5


def test_no_image_left_is_an_error() -> None:
    metrics = DepthMetrics(0.1, 10.0, "garg")
    metrics.update(torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3))
    with pytest.raises(UserError, match=r"none of 2 images has a depth between 0.1 and 10.0 .*crop \"garg\""):
        metrics.compute()


def test_ranks_add_up() -> None:
    prediction, target = (torch.from_numpy(array) for array in images((20, 30), batch=5, seed=1))
    target[2] = 0
    whole = DepthMetrics(1e-3, 10.0)
    whole.update(prediction, target)
    ranks = [DepthMetrics(1e-3, 10.0) for _ in range(2)]
    for number in range(5):
        ranks[number % 2].update(prediction[number : number + 1], target[number : number + 1])
    ranks[0].state += ranks[1].state
    assert ranks[0].compute() == pytest.approx(whole.compute(), rel=1e-14)
    assert (ranks[0].images, ranks[0].skipped) == (4, 1)


def test_sums_are_in_float64() -> None:
    """In float32 the average of 3,000 equal values drifts by more than this."""
    metrics = DepthMetrics(0.1, 10.0)
    for _ in range(3):
        metrics.update(torch.full((1000, 1, 1, 1), 2.2), torch.full((1000, 1, 1, 1), 2.0))
    once = (np.float64(np.float32(2.2)) - 2) / 2
    assert metrics.compute()["abs_rel"] == pytest.approx(once, rel=1e-12)


def test_kitti_crops_are_those_of_its_protocols() -> None:
    """Worked out for the 352 x 1216 pixels that are tested on, and for 370 x 1224: 0.40810811 x 370 = 151.0000007."""
    assert crop_slices("garg", (352, 1216)) == (slice(143, 349), slice(43, 1172))
    assert crop_slices("garg", (370, 1224)) == (slice(151, 366), slice(43, 1180))
    assert crop_slices("eigen", (352, 1216)) == (slice(117, 321), slice(43, 1172))
    assert crop_slices("nyu", (480, 640)) == (slice(45, 471), slice(41, 601))


def test_nyu_crop_needs_nyu_images() -> None:
    with pytest.raises(UserError, match=r"images of 480 x 640 pixels, this one has 240 x 320"):
        crop_slices("nyu", (240, 320))


def test_other_shape_is_an_error() -> None:
    with pytest.raises(UserError, match=r"predicted as \(1, 1, 4, 4\) and measured as \(1, 1, 4, 5\)"):
        DepthMetrics(0.1, 10.0).update(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5))
