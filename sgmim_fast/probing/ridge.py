"""Linear regression with an L2 penalty, solved exactly, from sums over all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-12, 5))
"""Penalties to choose from: 1e-6 to 1e2 in steps of the root of ten. Features count as if of variance 1."""
_CONSTANT = 1e-12  # share of a channel's mean square below which its variance is rounding


@dataclass(frozen=True)
class Linear:
    """A linear layer on tokens."""

    weight: Tensor
    """(C, T) float64."""
    bias: Tensor
    """(T,) float64."""

    def predict(self, tokens: Tensor) -> Tensor:
        """(N, T) float64 of (N, C)."""
        return tokens.double() @ self.weight + self.bias


class Moments:
    """Weighted sums over tokens, in float64: all that least squares needs to know. Those of several sets add up.

    Args:
        shift: (C,) near the features' mean, subtracted before anything is summed so that no digits are lost; the same
            for all that are to be added.
        targets: numbers to predict a token (T).
    """

    def __init__(self, shift: Tensor, targets: int) -> None:
        self.shift = shift.double()
        channels = len(shift)
        self.weight = torch.zeros((), dtype=torch.float64)
        self.x = torch.zeros(channels, dtype=torch.float64)
        self.y = torch.zeros(targets, dtype=torch.float64)
        self.xx = torch.zeros(channels, channels, dtype=torch.float64)
        self.xy = torch.zeros(channels, targets, dtype=torch.float64)
        self.yy = torch.zeros((), dtype=torch.float64)

    def update(self, tokens: Tensor, targets: Tensor, weight: Tensor) -> None:
        """Add tokens (N, C) with targets (N, T) and weights (N,), none negative; those of weight 0 are left out."""
        known = weight > 0
        x, y = tokens[known].double() - self.shift, targets[known].double()
        w = weight[known].double()[:, None]
        self.weight += w.sum()
        self.x += (w * x).sum(0)
        self.y += (w * y).sum(0)
        rooted = w.sqrt() * x
        self.xx.addmm_(rooted.T, rooted)
        self.xy.addmm_(x.T, w * y)
        self.yy += (w * y.square()).sum()

    def __add__(self, other: "Moments") -> "Moments":
        return self._combined(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        return self._combined(other, -1)

    def _combined(self, other: "Moments", sign: int) -> "Moments":
        found = Moments(self.shift, len(self.y))
        for name in ("weight", "x", "y", "xx", "xy", "yy"):
            setattr(found, name, getattr(self, name) + sign * getattr(other, name))
        return found

    def error(self, layer: Linear) -> float:
        """Sum over the tokens of weight times squared error, all targets together."""
        weight, bias = layer.weight, layer.bias + self.shift @ layer.weight
        found = self.yy - 2 * (weight * self.xy).sum() - 2 * bias @ self.y
        found += (weight * (self.xx @ weight)).sum() + 2 * bias @ (self.x @ weight) + self.weight * bias.square().sum()
        return float(found)


class Ridge:
    """Solutions for any strength of the penalty, after one eigendecomposition.

    Minimised is the weighted mean squared error plus strength times the sum of squared coefficients of the features
    scaled to mean 0 and variance 1. The constant term is not penalised; channels that are constant get no weight.
    """

    def __init__(self, moments: Moments) -> None:
        mean, target = moments.x / moments.weight, moments.y / moments.weight
        square = moments.xx.diagonal() / moments.weight
        variance = square - mean.square()
        varies = variance > _CONSTANT * square
        self._inverse = torch.where(varies, variance, 1).rsqrt() * varies
        scale = self._inverse[:, None]
        correlation = scale * (moments.xx / moments.weight - torch.outer(mean, mean)) * self._inverse
        values, self._vectors = torch.linalg.eigh(correlation)
        self._values = values.clamp(min=0)
        self._projected = self._vectors.T @ (scale * (moments.xy / moments.weight - torch.outer(mean, target)))
        self._mean, self._target = mean + moments.shift, target

    def solve(self, strength: float) -> Linear:
        """The minimum."""
        coefficients = self._vectors @ (self._projected / (self._values[:, None] + strength))
        weight = self._inverse[:, None] * coefficients
        return Linear(weight, self._target - self._mean @ weight)


@dataclass(frozen=True)
class ChosenRidge:
    """A solution, and how its strength was chosen."""

    layer: Linear
    strength: float
    error: float
    """Mean squared error of that strength on tokens of held-out images."""


def choose_ridge(folds: Sequence[Moments], strengths: Sequence[float] = STRENGTHS) -> ChosenRidge:
    """The strength with the least squared error when each part is held out once, then the solution on all of them."""
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    errors = [0.0] * len(strengths)
    for fold in folds:
        rest = total - fold
        if fold.weight == 0 or rest.weight <= 0:
            continue
        path = Ridge(rest)
        for number, strength in enumerate(strengths):
            errors[number] += fold.error(path.solve(strength))
    best = min(range(len(strengths)), key=lambda number: (errors[number], -strengths[number]))
    layer = Ridge(total).solve(strengths[best])
    return ChosenRidge(layer, strengths[best], errors[best] / float(total.weight))
