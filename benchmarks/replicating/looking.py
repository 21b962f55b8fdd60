"""Ways to look at features: their principal components, and how much of them is of which spatial frequency."""

from collections.abc import Iterable

import torch
from torch import Tensor


def principal_components(tokens: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Mean (C,) and directions (C, count) of the largest variance of tokens (N, C), in float64.

    A direction's sign is chosen so that its largest entry is positive: the same tokens give the same colours.
    """
    tokens = tokens.double()
    mean = tokens.mean(0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors[:, -count:].flip(1)
    largest = directions.abs().argmax(0, keepdim=True)
    return mean, directions * directions.gather(0, largest).sign()


def component_colours(maps: list[Tensor]) -> list[Tensor]:
    """Maps (C, h, w) of some images as colours (3, h, w) in 0..1: their three principal components together.

    Channels are brought to mean 0 and deviation 1. Components are computed over all maps and stretched from their 2nd
    to their 98th percentile, so that a colour means the same in all of them.
    """
    tokens = torch.cat([values.flatten(1).T for values in maps]).double()
    tokens = (tokens - tokens.mean(0)) / tokens.std(0).clamp(min=1e-12)
    mean, directions = principal_components(tokens)
    projected = (tokens - mean) @ directions
    low, high = (torch.quantile(projected, share, dim=0) for share in (0.02, 0.98))
    stretched = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    parts = stretched.split([values.shape[-2] * values.shape[-1] for values in maps])
    return [part.T.unflatten(1, tuple(values.shape[-2:])) for part, values in zip(parts, maps, strict=True)]


def relative_log_amplitudes(maps: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """How the amplitudes of feature maps fall with frequency.

    Each channel of each map (C, h, w) is Fourier-transformed; amplitudes are averaged over channels and maps, their
    logarithm is taken, and that of frequency 0 is subtracted (as in Park and Kim, arXiv 2202.06709, whose figures the
    paper's frequency analysis resembles). Values are along the half diagonal of square maps, from 0 to pi.

    Returns:
        Frequencies as multiples of pi, and relative log amplitudes.

    Raises:
        ValueError: if there is no map, or they are not square and of one side.
    """
    total: Tensor | None = None
    count = 0
    for values in maps:
        side = values.shape[-1]
        if values.dim() != 3 or values.shape[-2] != side or (total is not None and len(total) != side):
            raise ValueError(f"maps must be square and of one side; this one is {tuple(values.shape)}")
        amplitudes = torch.fft.fft2(values.double()).abs().sum(0)
        total = amplitudes if total is None else total + amplitudes
        count += len(values)
    if total is None:
        raise ValueError("there is no map")
    half = total.shape[-1] // 2 + 1
    diagonal = (total / count).diagonal()[:half].clamp(min=1e-30).log()
    frequencies = [2 * number / total.shape[-1] for number in range(half)]
    return frequencies, (diagonal - diagonal[0]).tolist()
