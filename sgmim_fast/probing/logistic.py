"""Multinomial logistic regression with an L2 penalty: one convex minimum, found to a tolerance from zeros by L-BFGS."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from sgmim_fast.errors import UserError
from sgmim_fast.probing.ridge import Linear

STRENGTHS = tuple(10.0**power for power in range(1, -7, -1))
"""Penalties to choose from, strongest first. Features count as if of variance 1."""
# Largest entry of the gradient, in coordinates in which the curvature is at most about 1: of the solution, and of those
# that are only compared with each other.
_TOLERANCE = 1e-6
_COMPARED = 1e-4
_ITERATIONS = 2000
_PATIENCE = 2  # strengths
_MEMORY = 20  # steps that L-BFGS remembers


class Logistic:
    """Solutions for any strength of the penalty and any weights of the same tokens.

    Minimised is the weighted mean over tokens of the cross-entropy between their shares of classes and the softmax,
    plus half the strength times the sum of squared coefficients of the features scaled to mean 0 and variance 1. The
    constant terms are not penalised; channels that are constant get no weight.

    The minimum does not depend on the way to it. L-BFGS goes there in the features' principal directions, each scaled
    by what bounds its curvature, a half of its variance (Boehning 1992) plus the strength: some tens of steps.

    Args:
        tokens: (N, C).
        shares: (N, K), rows sum to 1.
    """

    def __init__(self, tokens: Tensor, shares: Tensor) -> None:
        x = tokens.double()
        self._mean = x.mean(0)
        x = x - self._mean
        deviation = x.square().mean(0).sqrt()
        varies = deviation > 1e-6 * (self._mean.abs() + deviation)
        self._inverse = torch.where(varies, deviation, 1).reciprocal() * varies
        self._x = x * self._inverse
        self._y = shares.double()
        values, self._directions = torch.linalg.eigh(self._x.T @ self._x / len(x))
        self._curvature = values.clamp(min=0) / 2

    def solve(
        self, strength: float, weight: Tensor, start: Linear | None = None, tolerance: float = _TOLERANCE
    ) -> Linear:
        """The minimum.

        Args:
            weight: (N,), none negative, not all 0; tokens of weight 0 are left out.
            start: where the search begins, instead of zeros.
            tolerance: largest entry of the gradient that is left.

        Raises:
            UserError: if it is not found.
        """
        share = (weight.double() / weight.sum())[:, None]
        scale = self._directions / (self._curvature + strength).sqrt()
        unknown, bias = self._begin(strength, start)

        def gradient() -> Tensor:
            coefficients = scale @ unknown
            logs = log_softmax(self._x @ coefficients + bias, 1)
            slope = share * (logs.exp() - self._y)
            # As (K, N) @ (N, C): the other way round is several times slower.
            unknown.grad = scale.T @ ((slope.T @ self._x).T + strength * coefficients)
            bias.grad = slope.sum(0)
            loss: Tensor = -(share * self._y * logs).sum() + strength / 2 * coefficients.square().sum()
            return loss

        search = torch.optim.LBFGS(
            [unknown, bias],
            max_iter=_ITERATIONS,
            max_eval=2 * _ITERATIONS,
            tolerance_grad=tolerance,
            tolerance_change=0,
            history_size=_MEMORY,
            line_search_fn="strong_wolfe",
        )
        search.step(gradient)
        gradient()
        assert unknown.grad is not None
        assert bias.grad is not None
        left = max(unknown.grad.abs().max().item(), bias.grad.abs().max().item())
        if not left <= tolerance:
            raise UserError(
                f"the classifier's minimum was not found at strength {strength:g} (gradient {left:.1e}); the features "
                "may be degenerate"
            )
        layer = self._inverse[:, None] * (scale @ unknown)
        return Linear(layer, bias - self._mean @ layer)

    def _begin(self, strength: float, start: Linear | None) -> tuple[Tensor, Tensor]:
        classes = self._y.shape[1]
        if start is None:
            return self._x.new_zeros(self._x.shape[1], classes), self._x.new_zeros(classes)
        coefficients = start.weight * torch.where(self._inverse > 0, self._inverse, 1).reciprocal()[:, None]
        unknown = (self._curvature + strength).sqrt()[:, None] * (self._directions.T @ coefficients)
        return unknown, start.bias + self._mean @ start.weight

    def entropy(self, layer: Linear, weight: Tensor) -> float:
        """Sum over the tokens of weight times cross-entropy."""
        bias = layer.bias + self._mean @ layer.weight
        coefficients = layer.weight * torch.where(self._inverse > 0, self._inverse, 1).reciprocal()[:, None]
        logs = log_softmax(self._x @ coefficients + bias, 1)
        return float(-(weight.double()[:, None] * self._y * logs).sum())


@dataclass(frozen=True)
class ChosenLogistic:
    """A solution, and how its strength was chosen."""

    layer: Linear
    strength: float
    entropy: float
    """Mean cross-entropy of that strength on tokens of held-out images, nats."""


def choose_logistic(
    tokens: Tensor, shares: Tensor, weight: Tensor, fold: Tensor, strengths: Sequence[float] = STRENGTHS
) -> ChosenLogistic:
    """The strength with the least cross-entropy when each fold is held out once, then the solution on all tokens.

    Strengths are tried in their order until two in succession are no better than the best before them.

    Args:
        tokens: (N, C).
        shares: (N, K), rows sum to 1.
        weight: (N,), positive.
        fold: (N,) int64.
        strengths: to choose from, strongest first.
    """
    fits = Logistic(tokens, shares)
    parts = [fold == number for number in fold.unique()]
    starts: list[Linear | None] = [None] * len(parts)
    best, least, worse = 0.0, float("inf"), 0
    for strength in strengths:
        error = 0.0
        for number, held in enumerate(parts):
            found = fits.solve(strength, weight * ~held, starts[number], _COMPARED)
            starts[number] = found  # the next, weaker one begins where this one ended
            error += fits.entropy(found, weight * held)
        worse = 0 if error < least else worse + 1
        if error < least:
            best, least = strength, error
        if worse == _PATIENCE:
            break
    return ChosenLogistic(fits.solve(best, weight), best, least / float(weight.sum()))
