"""The curves of a run's page are drawn where the values are."""

import json
import re

import numpy as np
from tiny_run import metric_row

from sgmim_fast.report.curves import POINTS, format_value, nice_ticks, render_charts, smooth
from sgmim_fast.report.run import Row


def test_long_runs_are_merged() -> None:
    rows: list[Row] = [metric_row(step) for step in range(1, 10 * POINTS + 1)]
    html = render_charts(rows)
    found = re.search(r'class="readout">(.*?)</script>', html)
    assert found is not None
    numbers = json.loads(found[1])
    assert len(numbers["x"]) == len(numbers["values"]["loss"]) == POINTS
    assert "the mean of about 10 of the 6,000 logged rows" in html
    assert numbers["at"][-1].startswith("step 6,000")
    assert len(html) < 400_000


def test_curve_is_drawn_where_the_values_are() -> None:
    rows: list[Row] = [metric_row(step, lr=rate) for step, rate in ((0, 0.0), (50, 0.5), (100, 1.0))]
    html = render_charts([row | {"loss": 1.0, "image_loss": None, "structure_loss": None} for row in rows])
    assert 'class="line lr" d="M0.0 1000.0h0L500.0 500.0L1000.0 0.0"' in html
    assert "image_loss" not in html
    gap = render_charts([rows[0] | {"lr": 1.0}, rows[1] | {"lr": None}, rows[2] | {"lr": 1.0}])
    assert 'class="line lr" d="M0.0 0.0h0M1000.0 0.0h0"' in gap


def test_one_row_is_a_dot() -> None:
    assert 'class="line lr" d="M500.0 ' in render_charts([metric_row(7)])


def test_spiky_values_get_a_logarithmic_axis() -> None:
    calm: list[Row] = [metric_row(step) for step in range(1, 30)]
    assert "logarithmic" not in render_charts(calm)
    assert "logarithmic" in render_charts([calm[0] | {"grad_norm": 5000.0}, *calm[1:]])


def test_ticks_and_numbers() -> None:
    assert nice_ticks(0.31, 1.62) == [0, 0.5, 1, 1.5, 2]
    assert nice_ticks(0, 0) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(5, 5)[0] <= 5 <= nice_ticks(5, 5)[-1]
    values = (0.12345, 12.345, 123456.0, 2e-4, 0.0, float("nan"))
    assert [format_value(value) for value in values] == ["0.123", "12.3", "123,456", "2.00e-4", "0", "–"]
    assert format_value(0.031, percent=True) == "3.1 %"


def test_smoothing_keeps_levels_and_gaps() -> None:
    values = np.full(200, 3.0)
    values[50] = np.nan
    even = smooth(values)
    assert np.isnan(even[50])
    assert np.allclose(np.delete(even, 50), 3.0)
    noise = np.random.default_rng(0).normal(size=200)
    assert smooth(noise).std() < 0.6 * noise.std()
