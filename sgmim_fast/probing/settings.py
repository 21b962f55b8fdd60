"""What is probed, and on how much."""

from dataclasses import dataclass
from typing import Literal, get_args

from sgmim_fast.config.checks import require

Probe = Literal["depth", "segmentation", "knn-depth", "knn-segmentation"]
PROBES: tuple[Probe, ...] = get_args(Probe)
"""Linear, linear, nearest neighbours, nearest neighbours."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Equal settings on equal data mean equal images, tokens and folds, whatever the features.

    Raises:
        UserError: for any value that makes no sense; the message names the field.
    """

    train_images: int = 200
    """Labelled images, drawn by the seed; a larger number adds to those of a smaller one."""
    val_images: int = 100
    """Images that are scored, evenly from all over the split."""
    seed: int = 0
    """Draws images and tokens."""
    tokens: int = 16_384
    """Training tokens at most for nearest neighbours and for the classifier, the same number from every image. The
    linear depth probe uses all."""
    folds: int = 5
    """Parts of the training images, each held out once to choose how strongly a linear probe is regularised; one an
    image where there are fewer images."""
    neighbours: int = 20
    """Training tokens that vote (k)."""
    temperature: float = 0.07
    """A neighbour's vote is exp(similarity / temperature)."""

    def __post_init__(self) -> None:
        least = {"train_images": 2, "val_images": 1, "seed": 0, "folds": 2, "neighbours": 1}
        for name, low in least.items():
            require(getattr(self, name) >= low, f"{name} {getattr(self, name)} must be {low} or more")
        require(
            self.tokens >= self.train_images,
            f"tokens {self.tokens} must be {self.train_images} or more: at least one of each training image",
        )
        require(self.temperature > 0, f"temperature {self.temperature} must be positive")
