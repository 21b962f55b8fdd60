"""Label maps as class indices."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sgmim_fast.config import IGNORED_LABEL
from sgmim_fast.data import reading
from sgmim_fast.data.members import Encoded
from sgmim_fast.errors import UserError


@dataclass(frozen=True)
class LabelReader:
    """Reads the label maps of one data set.

    Args:
        classes: at most 255.
        first: stored label of class 0; smaller ones stand for no class.
        ignored: stored label that stands for no class.
    """

    classes: int
    first: int = 0
    ignored: int = IGNORED_LABEL

    key = "label"
    """What a batch calls these targets."""

    def read(self, file: Encoded) -> np.ndarray:
        """Class indices, (H, W) uint8: 0 to ``classes`` - 1, or ``IGNORED_LABEL``.

        Raises:
            UserError: if the map is unreadable, holds colours, or labels that no class has; it names the file.
        """
        stored = reading.read_labels(file)
        known = self._known[stored]
        if not known.all():
            row, column = (int(place) for place in np.argwhere(~known)[0])
            value = int(stored[row, column])
            raise UserError(
                f"{file.name}: label {value} at row {row}, column {column} is no class; {self.classes} classes are "
                f"stored as {self.first}..{self.first + self.classes - 1}, and none as {self._spoken_ignored}: correct "
                "the map, or the number of classes"
            )
        labels: np.ndarray = self._table[stored]
        return labels

    @property
    def _spoken_ignored(self) -> str:
        return f"0 or {self.ignored}" if self.first else str(self.ignored)

    @cached_property
    def _table(self) -> np.ndarray:
        """What each stored value becomes."""
        table = np.full(256, IGNORED_LABEL, np.uint8)
        stored = np.arange(self.first, min(self.first + self.classes, 256))
        table[stored] = stored - self.first
        table[self.ignored] = IGNORED_LABEL
        return table

    @cached_property
    def _known(self) -> np.ndarray:
        """Which stored values have a meaning."""
        known = np.arange(256) < self.first + self.classes
        known[self.ignored] = True
        return known
