"""Nearest neighbours: what a token's most similar training tokens have, weighted by their similarity."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_AT_ONCE = 1024  # tokens that are compared with all training tokens in one product


class Neighbours:
    """Training tokens by cosine similarity, every channel scaled to mean 0 and variance 1 on the training tokens.

    Votes are those of DINO's k-NN (arXiv 2104.14294): softmax(similarity / temperature) over the k nearest. There one
    vector stands for an image; maps side by side differ in scale and have a common mean that would make all tokens
    alike, so they are scaled first. The search is exact.

    Args:
        tokens: (N, C).
        targets: (N, T): whatever is to be averaged, such as shares of classes.
        neighbours: k, at most N.
        temperature: of the votes.
        at_once: tokens compared in one product; changes nothing but time and memory.
    """

    def __init__(
        self, tokens: Tensor, targets: Tensor, neighbours: int, temperature: float, at_once: int = _AT_ONCE
    ) -> None:
        x = tokens.double()
        self._mean = x.mean(0)
        deviation = x.std(0, correction=0)
        varies = deviation > 1e-6 * (self._mean.abs() + deviation)
        self._inverse = torch.where(varies, deviation, 1).reciprocal() * varies
        self._known = self._directions(x)
        self._targets = targets.double()
        self._neighbours, self._temperature, self._at_once = min(neighbours, len(tokens)), temperature, at_once

    def _directions(self, tokens: Tensor) -> Tensor:
        return normalize((tokens.double() - self._mean) * self._inverse, dim=1).float()

    def predict(self, tokens: Tensor) -> Tensor:
        """(M, T) float64 of (M, C)."""
        found = []
        for part in self._directions(tokens).split(self._at_once):
            similarity, which = (part @ self._known.T).topk(self._neighbours, dim=1)
            votes = (similarity.double() / self._temperature).softmax(1)
            found.append((votes[:, None] @ self._targets[which])[:, 0])
        return torch.cat(found)
