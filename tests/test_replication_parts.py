"""What the comparison of ways to pre-train is made of: statistics, ways to look at features, charts, and sizes."""

import math
import re

import numpy as np
import pytest
import torch

from benchmarks.replicating import statistics
from benchmarks.replicating.arms import ARMS, encoder_of, make_task
from benchmarks.replicating.charts import Panel, Point, render_panels
from benchmarks.replicating.figures import joint_map
from benchmarks.replicating.looking import component_colours, relative_log_amplitudes
from benchmarks.replicating.sizes import SIZES, Size
from benchmarks.replicating.stages import make_backbone
from sgmim_fast.tasks.finetuned import backbone_options
from sgmim_fast.tasks.finetuned import make_task as make_dense_task


def test_paired_differences_by_hand() -> None:
    gap = statistics.paired_difference({0: 1.0, 1: 2.0, 2: 4.0, 9: 0.0}, {0: 0.5, 1: 1.0, 2: 2.5, 7: 1.0})
    assert gap is not None
    assert gap.seeds == 3
    assert gap.mean == pytest.approx(1.0)
    assert gap.interval is not None
    reach = 4.302653 * 0.5 / math.sqrt(3)  # Student's t of two degrees, standard deviation of 0.5, 1 and 1.5
    assert gap.interval == pytest.approx((1 - reach, 1 + reach), abs=1e-5)
    assert statistics.paired_difference({0: 1.0}, {1: 1.0}) is None
    for freedom, value in ((1, 12.70620), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)):
        assert statistics.student_quantile(0.975, freedom) == pytest.approx(value, abs=1e-5)


def test_bootstrap_over_images() -> None:
    rng = np.random.default_rng(0)
    base = np.zeros((200, 11))
    base[:, 5], base[:, -2] = rng.normal(2, 0.5, 200), 1
    better = base.copy()
    better[:, 5] -= rng.normal(0.2, 0.1, 200)
    low, high = statistics.bootstrap_difference([better], [base], statistics.depth_figure(5), draws=200)
    assert low < -0.2 < high < 0
    counts = np.zeros((3, 2, 2))
    counts[0], counts[1] = [[3, 1], [0, 0]], [[0, 0], [2, 2]]
    assert statistics.mean_iou(counts) == pytest.approx((3 / 6 + 2 / 5) / 2)


def test_spectrum_of_known_maps() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = 1 + 0.5 * torch.cos(2 * math.pi * 4 * (x + y) / 16)
    frequencies, amplitudes = relative_log_amplitudes([wave[None]])
    assert frequencies == [number / 8 for number in range(9)]
    assert amplitudes[0] == 0
    assert amplitudes[4] == pytest.approx(math.log(0.25), abs=1e-6)
    assert max(amplitudes[1:4] + amplitudes[5:]) < -10
    with pytest.raises(ValueError, match="square"):
        relative_log_amplitudes([torch.zeros(1, 4, 6)])


def test_components_of_known_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    strong, weak = torch.randn(2, 1, 8, 8, generator=generator)
    # What two channels share is the first component, however small the one of them is.
    maps = [torch.cat([weak, sign * 10 * strong, sign * 0.01 * strong]) for sign in (1, -1)]
    one, other = component_colours(maps)
    assert one.shape == (3, 8, 8)
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert torch.corrcoef(torch.stack([one[0].flatten(), strong.flatten().double()]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([other[0].flatten(), strong.flatten().double()]))[0, 1] < -0.9


def test_all_maps_are_brought_to_the_grid_of_the_second() -> None:
    fine = torch.arange(16.0).view(1, 4, 4)
    coarse = torch.tensor([[[7.0]]])
    joint = joint_map([fine, 100 + torch.zeros(2, 2, 2), coarse])
    assert joint.shape == (4, 2, 2)
    assert joint[0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert joint[1:].flatten(1).tolist() == [[100.0] * 4, [100.0] * 4, [7.0] * 4]


def test_ticks_stay_within_their_panel() -> None:
    """Also where the points end before the last tick."""
    panel = Panel("a", "x", {"sgmim": [Point(0.0, 1.0), Point(0.5, 2.0)]}, "linear", (0, 0.5, 1))
    svg = render_panels([panel])
    found = re.search(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">1</text>', svg)
    legend = re.search(r'<g transform="translate\((\d+) 20\)">', svg)
    assert found is not None
    assert legend is not None
    assert float(found[1]) < float(legend[1])


def test_sizes_leave_nothing_to_chance() -> None:
    assert isinstance(SIZES["micro"], Size)
    for size in SIZES.values():
        assert max(size.labels) <= size.scenes
        assert 1.0 in size.lr_factors


@pytest.mark.parametrize("name", list(SIZES))
def test_models_and_heads_of_every_size_fit_each_other(name: str) -> None:
    size = SIZES[name]
    weights = encoder_of(make_task(ARMS["sgmim"], size.model, 0))
    image = torch.zeros(1, 3, *size.model.hw)
    with torch.no_grad():
        for head, channels in ((size.depth, 1), (size.segmentation, size.segmentation.classes)):
            backbone = make_backbone(size, weights, **backbone_options(head))
            task = make_dense_task(backbone, head).eval()
            assert task.predict(image).shape == (1, channels, *size.model.hw)
