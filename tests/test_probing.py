"""The parts of probes, each against an independent solution."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_cases import tiny_backbone, tiny_image
from torch import Tensor

from sgmim_fast.data.dense.evaluation import EvaluationSample
from sgmim_fast.errors import UserError
from sgmim_fast.probing import logistic
from sgmim_fast.probing.features import BackboneFeatures, Features, RowColour
from sgmim_fast.probing.grid import cell_means, cell_sums, onto_grid, to_pixels, tokens_of
from sgmim_fast.probing.logistic import Logistic, choose_logistic
from sgmim_fast.probing.neighbours import Neighbours
from sgmim_fast.probing.ridge import STRENGTHS, Linear, Moments, Ridge, choose_ridge
from sgmim_fast.probing.targets import ClassTarget, DepthTarget, best_on_grid


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample_of(image: Tensor, target: Tensor) -> EvaluationSample:
    return EvaluationSample(image, target, "one", (target.shape[0], target.shape[1]), 0)


# -- the grid


@pytest.mark.parametrize("size", [(16, 24), (13, 22)])
def test_cells_are_what_slices_give(size: tuple[int, int]) -> None:
    values = random(2, *size)
    for row, top in enumerate(range(0, size[0], 8)):
        for column, left in enumerate(range(0, size[1], 8)):
            cell = values[:, top : top + 8, left : left + 8].flatten(1)
            torch.testing.assert_close(cell_sums(values, 8)[:, row, column], cell.sum(1))
            torch.testing.assert_close(cell_means(values, 8)[:, row, column], cell.mean(1))


def test_upsampling_keeps_a_plane_where_cells_have_neighbours() -> None:
    """Values at the cells' centres of a plane, in an image whose last cells are cut, give the plane back."""
    height, width = 29, 38
    rows, columns = torch.arange(4) * 8 + 3.5, torch.arange(5) * 8 + 3.5
    plane = 2 * rows[:, None] + 3 * columns
    found = to_pixels(plane[None], 8, (height, width), (height, width))
    assert found.shape == (1, height, width)
    expected = 2 * torch.arange(height)[:, None] + 3.0 * torch.arange(width)
    torch.testing.assert_close(found[0, 4:28, 4:36], expected[4:28, 4:36])


def test_predictions_go_on_to_the_size_of_the_target() -> None:
    found = to_pixels(random(3, 2, 3), 8, (13, 22), (26, 44))
    whole = to_pixels(random(3, 2, 3), 8, (13, 22), (13, 22))
    torch.testing.assert_close(found, F.interpolate(whole[None], size=(26, 44), mode="bilinear")[0])


def test_maps_of_other_strides_come_onto_the_grid() -> None:
    fine = random(2, 4, 6)
    torch.testing.assert_close(onto_grid(fine, 4, 8), F.avg_pool2d(fine[None], 2)[0])
    coarse = random(2, 2, 3)
    torch.testing.assert_close(onto_grid(coarse, 16, 8), F.interpolate(coarse[None], size=(4, 6), mode="bilinear")[0])
    assert onto_grid(coarse, 8, 8) is not None
    with pytest.raises(UserError, match="do not divide"):
        onto_grid(coarse, 16, 12)


def test_tokens_follow_the_rows_of_a_grid() -> None:
    grid = random(2, 3, 4)
    assert tokens_of(grid)[5].equal(grid[:, 1, 1])


# -- targets


def test_depth_target_is_the_mean_logarithm_of_valid_pixels() -> None:
    depth = random(13, 22).exp()
    depth[:8, :8] = 0
    depth[0, 10] = 50.0  # too far
    target = DepthTarget(0.001, 40.0, "none")
    cells = target.cells(sample_of(random(3, 13, 22), depth), 8)
    assert cells.values[0, 0, 0] == 0
    assert cells.weight.tolist() == [[0, 63, 48], [40, 40, 30]]
    part = depth[:8, 8:16]
    torch.testing.assert_close(cells.values[0, 0, 1], part[part < 40].log().mean())


def test_class_target_is_the_share_of_labelled_pixels() -> None:
    label = torch.randint(0, 3, (13, 22), generator=torch.Generator().manual_seed(0))
    label[:8, :8] = 255
    label[8, 0] = 255
    cells = ClassTarget(3).cells(sample_of(random(3, 13, 22), label), 8)
    assert cells.weight.tolist() == [[0, 64, 48], [39, 40, 30]]
    assert cells.values[:, 0, 0].tolist() == [0, 0, 0]
    for number in range(3):
        torch.testing.assert_close(cells.values[number, 0, 1], (label[:8, 8:16] == number).float().mean())
    resized = ClassTarget(3).cells(sample_of(random(3, 26, 44), label), 16)  # the same cells in an image twice as large
    torch.testing.assert_close(resized.values, cells.values)
    torch.testing.assert_close(resized.weight, cells.weight * 4)


def test_grid_target_ignores_cells_without_a_target() -> None:
    depth = torch.full((16, 24), 5.0)
    depth[:8, :8] = 0
    target = DepthTarget(0.001, 30.0, "none")
    cells = target.cells(sample_of(random(3, 16, 24), depth), 8)
    found = best_on_grid(cells, 8, (16, 24), (16, 24)).exp()[0]
    torch.testing.assert_close(found[depth > 0], depth[depth > 0])


# -- ridge


def weighted(tokens: int = 60, channels: int = 7, targets: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    x = random(tokens, channels) @ random(channels, channels, seed=1) + 100 * random(channels, seed=2)
    y = x @ random(channels, targets, seed=3) + random(tokens, targets, seed=4) + 5
    return x, y, torch.arange(tokens) % 5  # some have no weight


def moments_of(x: Tensor, y: Tensor, weight: Tensor, shift: Tensor | None = None) -> Moments:
    found = Moments(x.mean(0) if shift is None else shift, y.shape[1])
    found.update(x, y, weight)
    return found


@pytest.mark.parametrize("strength", [1e-4, 0.3, 20.0])
def test_ridge_equals_the_normal_equations(strength: float) -> None:
    """Solved by numpy with the constant term as a column of its own that the penalty leaves out."""
    x, y, weight = weighted()
    layer = Ridge(moments_of(x, y, weight)).solve(strength)
    a, b, w = (value.double().numpy() for value in (x, y, weight))
    mean = np.average(a, axis=0, weights=w)
    scaled = (a - mean) / np.sqrt(np.average((a - mean) ** 2, axis=0, weights=w))
    design = np.hstack([scaled, np.ones((len(a), 1))])
    penalty = strength * w.sum() * np.diag([1.0] * a.shape[1] + [0.0])
    solution = np.linalg.solve(design.T @ (w[:, None] * design) + penalty, design.T @ (w[:, None] * b))
    np.testing.assert_allclose(layer.predict(x).numpy(), design @ solution, rtol=1e-9)


def test_weights_are_repetitions() -> None:
    x, y, weight = weighted()
    many = [value.repeat_interleave(weight, 0) for value in (x, y)]
    one = Ridge(moments_of(x, y, weight)).solve(0.1)
    other = Ridge(moments_of(*many, torch.ones(len(many[0])))).solve(0.1)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-8, atol=1e-10)


def test_moments_of_parts_add_up_and_tell_the_error() -> None:
    x, y, weight = weighted()
    whole = moments_of(x, y, weight)
    first, second = (moments_of(x[part], y[part], weight[part], x.mean(0)) for part in (slice(25), slice(25, 60)))
    for combined in (first + second, whole + second - second):
        for name in ("weight", "x", "y", "xx", "xy", "yy"):
            torch.testing.assert_close(getattr(combined, name), getattr(whole, name), rtol=1e-12, atol=1e-7)
    layer = Linear(random(7, 2, seed=9).double(), random(2, seed=8).double())
    direct = (weight[:, None] * (layer.predict(x) - y.double()).square()).sum()
    assert whole.error(layer) == pytest.approx(float(direct), rel=1e-9)


def test_constant_channels_change_nothing() -> None:
    x, y, weight = weighted()
    wider = torch.cat([x, torch.full((len(x), 1), 7.3)], 1)
    plain = Ridge(moments_of(x, y, weight)).solve(0.1)
    found = Ridge(moments_of(wider, y, weight)).solve(0.1)
    assert found.weight[7].abs().max() == 0
    torch.testing.assert_close(found.predict(wider), plain.predict(x))


def test_ridge_strength_is_the_best_of_held_out_folds() -> None:
    x, y = random(40, 30), random(40, 1, seed=5)
    y = y + x[:, :1]
    parts = [slice(start, start + 8) for start in range(0, 40, 8)]
    chosen = choose_ridge([moments_of(x[part], y[part], torch.ones(8), x.mean(0)) for part in parts])
    errors = []
    for strength in STRENGTHS:
        error = 0.0
        for part in parts:
            rest = torch.ones(40, dtype=torch.bool)
            rest[part] = False
            layer = Ridge(moments_of(x[rest], y[rest], torch.ones(32))).solve(strength)
            error += float((layer.predict(x[part]) - y[part]).square().sum())
        errors.append(error)
    assert chosen.strength == STRENGTHS[int(np.argmin(errors))]
    assert chosen.strength not in (STRENGTHS[0], STRENGTHS[-1])
    assert chosen.error == pytest.approx(min(errors) / 40)
    everything = Ridge(moments_of(x, y, torch.ones(40))).solve(chosen.strength)
    torch.testing.assert_close(chosen.layer.weight, everything.weight)


# -- logistic regression


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0])
def test_logistic_regression_is_at_the_minimum(strength: float) -> None:
    """The objective is written anew, pixel by pixel, and its gradient left to autograd."""
    tokens, classes = 50, 4
    x = random(tokens, 6) @ random(6, 6, seed=1) + 10
    counts = torch.randint(0, 5, (tokens, classes), generator=torch.Generator().manual_seed(2))
    counts[:, 0] += 1
    weight = counts.sum(1)
    layer = Logistic(x, counts / weight[:, None]).solve(strength, weight)
    token, label = (
        torch.tensor(column)
        for column in zip(
            *[(t, c) for t in range(tokens) for c in range(classes) for _ in range(int(counts[t, c]))], strict=True
        )
    )
    parameters = [layer.weight.clone().requires_grad_(), layer.bias.clone().requires_grad_()]
    deviation = x.double().std(0, correction=0)[:, None]
    logits = x.double()[token] @ parameters[0] + parameters[1]
    loss = F.cross_entropy(logits, label) + strength / 2 * (parameters[0] * deviation).square().sum()
    gradients = torch.autograd.grad(loss, parameters)
    # The features' mean of about 10 is the lever that the constant term's rounding acts with.
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4
    better = loss.detach().clone()
    for _ in range(3):  # convex: no small step may win anything worth the name
        moved = [value.detach() + 1e-3 * random(*value.shape, seed=7).double() for value in parameters]
        other = F.cross_entropy(x.double()[token] @ moved[0] + moved[1], label)
        assert other + strength / 2 * (moved[0] * deviation).square().sum() >= better - 1e-9


def test_logistic_regression_does_not_depend_on_where_it_begins() -> None:
    x, shares = random(40, 5), random(40, 3, seed=1).softmax(1)
    fits = Logistic(x, shares)
    weight = torch.arange(40) % 3
    one = fits.solve(1e-3, weight)
    other = fits.solve(1e-3, weight, Linear(random(5, 3, seed=2).double(), random(3, seed=3).double()))
    torch.testing.assert_close(one.predict(x).softmax(1), other.predict(x).softmax(1), rtol=0, atol=1e-4)
    direct = -(weight[:, None] * shares * one.predict(x).log_softmax(1)).sum()
    assert fits.entropy(one, weight) == pytest.approx(float(direct))


def test_strength_of_the_classifier_is_the_best_of_held_out_folds() -> None:
    x = random(60, 20)
    shares = F.one_hot((x[:, :3] + 2 * random(60, 3, seed=1)).argmax(1), 3)
    weight, fold = torch.arange(60) % 4 + 1, torch.arange(60) % 5
    chosen = choose_logistic(x, shares, weight, fold)
    fits = Logistic(x, shares)
    errors = {
        strength: sum(
            fits.entropy(fits.solve(strength, weight * (fold != part)), weight * (fold == part)) for part in range(5)
        )
        for strength in logistic.STRENGTHS
    }
    assert chosen.strength == min(errors, key=lambda strength: errors[strength])
    assert chosen.strength not in (logistic.STRENGTHS[0], logistic.STRENGTHS[-1])
    assert chosen.entropy == pytest.approx(errors[chosen.strength] / float(weight.sum()), rel=1e-3)
    torch.testing.assert_close(chosen.layer.weight, fits.solve(chosen.strength, weight).weight)


def test_logistic_regression_of_separable_and_of_constant_features() -> None:
    label = torch.arange(30) % 3
    x = torch.cat([3 * F.one_hot(label, 3) + 0.1 * random(30, 3), random(30, 60, seed=4), torch.ones(30, 1)], 1)
    chosen = choose_logistic(x, F.one_hot(label, 3), torch.ones(30), torch.arange(30) // 3 % 5)
    assert chosen.layer.predict(x).argmax(1).equal(label)
    assert chosen.layer.weight[-1].abs().max() == 0
    assert chosen.entropy < 0.7  # log 3 is what knowing nothing costs, and there are 60 channels of noise


# -- nearest neighbours


def test_neighbours_equal_a_loop() -> None:
    known, targets, asked = random(50, 6) + 4, random(50, 3, seed=1), random(11, 6, seed=2) + 4
    found = Neighbours(known, targets, 5, 0.07).predict(asked)
    a, t, q = (value.double().numpy() for value in (known, targets, asked))
    mean, deviation = a.mean(0), a.std(0)
    for number, token in enumerate(q):
        one = (token - mean) / deviation
        similar = []
        for other in a:
            two = (other - mean) / deviation
            similar.append(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
        nearest = sorted(range(50), key=lambda place: -similar[place])[:5]
        votes = np.exp(np.array([similar[place] for place in nearest]) / 0.07)
        expected = (votes[:, None] * t[nearest]).sum(0) / votes.sum()
        np.testing.assert_allclose(found[number].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_neighbours_do_not_depend_on_the_size_of_products() -> None:
    known, targets, asked = random(50, 6), random(50, 3, seed=1), random(11, 6, seed=2)
    whole = Neighbours(known, targets, 5, 0.07).predict(asked)
    parts = Neighbours(known, targets, 5, 0.07, at_once=3).predict(asked)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    few = Neighbours(known[:3], targets[:3], 5, 1e6).predict(asked)  # fewer than k, all with the same vote
    torch.testing.assert_close(few, targets[:3].double().mean(0).expand(11, 3), rtol=1e-5, atol=1e-5)


# -- features


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_backbone_features_are_its_maps_side_by_side(size: tuple[int, int]) -> None:
    backbone = tiny_backbone("swin", norm="last")
    image = tiny_image(size=size, batch=1)[0]
    found = BackboneFeatures(backbone)(image)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert found.shape == (8 + 16 + 32 + 64, rows, columns)
    with torch.no_grad():
        maps = [grid[0] for grid in backbone.eval()(image[None])]
    torch.testing.assert_close(found[8:24], maps[1])
    torch.testing.assert_close(found[24:56], onto_grid(maps[2], 16, 8)[:, :rows, :columns])
    assert BackboneFeatures(backbone, maps=[1])(image).equal(maps[1])
    coarse = BackboneFeatures(backbone, maps=[2, 3])
    assert (coarse.stride, coarse.channels) == (16, 96)
    assert coarse(image)[:32].equal(maps[2])
    placed = BackboneFeatures(backbone, maps=[1], place=True)
    assert placed.channels == 18
    assert placed(image).equal(torch.cat([maps[1], RowColour(8)(image)[:2]]))


def test_vit_features_lie_on_its_own_grid() -> None:
    extractor = BackboneFeatures(tiny_backbone("vit", pyramid=False, norm="last"))
    assert extractor(tiny_image(size=(64, 80), batch=1)[0]).shape == (32, 4, 5)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: BackboneFeatures(tiny_backbone("vit")), "pyramid=False"),
        (lambda: BackboneFeatures(tiny_backbone("swin"), maps=[4]), "maps 4 must be among 0 to 3"),
        (lambda: BackboneFeatures(tiny_backbone("swin"), maps=[1, 0]), "ascending"),
        (lambda: BackboneFeatures(tiny_backbone("swin"), stride=12), "stride 12 must divide"),
        (lambda: RowColour(0), "stride 0"),
        (lambda: Features(RowColour(), dtype=torch.float64), "float32 or float16"),
    ],
)
def test_features_that_cannot_be(build: Callable[[], object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build()


def test_row_colour_says_where_and_which_colour() -> None:
    image = random(3, 20, 24)
    found = RowColour(8)(image)
    assert found.shape == (5, 3, 3)
    assert found[0, :, 0].tolist() == pytest.approx([4 / 20, 12 / 20, 18 / 20])
    assert found[1, 0].tolist() == pytest.approx([4 / 24, 12 / 24, 20 / 24])
    torch.testing.assert_close(found[2:, 2, 1], image[:, 16:, 8:16].flatten(1).mean(1))


def test_kept_features_are_those_that_would_be_computed() -> None:
    images = {str(number): random(3, 16, 16, seed=number) for number in range(3)}
    for dtype in (torch.float32, torch.float16):
        size = 5 * 4 * dtype.itemsize
        roomy, narrow = (Features(RowColour(8), budget=count * size, dtype=dtype) for count in (3, 1))
        for _ in range(2):
            for name, image in images.items():
                assert roomy.of(name, image).equal(narrow.of(name, image))
                assert roomy.of(name, image).dtype == torch.float32
        assert (roomy.computed, roomy.kept) == (3, 3 * size)
        assert narrow.kept == size
        assert narrow.computed == 1 + 2 * 2
    other = roomy.of("0", random(3, 16, 24))
    assert other.shape == (5, 2, 3)
    with pytest.raises(UserError, match="late: its features are not finite; float16 may be too narrow"):
        roomy.of("late", 1e6 * random(3, 16, 16))
