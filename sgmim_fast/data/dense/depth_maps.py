"""Depth maps as metres, and the signs of a wrong unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sgmim_fast.data import reading
from sgmim_fast.data.members import Encoded
from sgmim_fast.errors import UserError

_UNITS = {
    1000.0: "value / 1000 (millimetres)",
    256.0: "value / 256 (KITTI's)",
    100.0: "value / 100 (centimetres)",
    5000.0: "value / 5000 (TUM's)",
    1.0: "whole metres",
}


class Reach(NamedTuple):
    """What a data set's depths are like, in metres; wide enough for every real file."""

    expected: str
    """The same in words, to end "but ..."."""
    farthest: tuple[float, float]
    """Bounds of the largest depth of several maps."""
    typical: tuple[float, float]
    """Bounds of the median depth of several maps."""
    remedy: str = "convert the maps"


class Measured(NamedTuple):
    """What some maps have been found to hold, in metres."""

    farthest: float
    typical: float


@dataclass(frozen=True)
class DepthReader:
    """Reads the maps of one data set.

    Args:
        name: of the data set, in messages.
        units_per_metre: stored units; None where what is stored is inverse: ``near`` over the depth.
        near: metres that 65535 stands for, of inverse maps.
        integers: the data set's maps are 16-bit pictures and nothing else.
        reach: what to expect; None to expect nothing.
    """

    name: str
    units_per_metre: float | None
    near: float | None = None
    integers: bool = True
    reach: Reach | None = None

    key = "depth"
    """What a batch calls these targets."""

    def read(self, file: Encoded) -> np.ndarray:
        """Metres, (H, W) float32; 0 where there is no valid depth.

        Raises:
            UserError: if the map is unreadable, of 8 bits, of another kind than the data set's, or has depths that the
                data set cannot have; it names the file.
        """
        stored = reading.read_grey(file)
        if stored.dtype == np.uint8 or stored.dtype == np.int8:
            raise UserError(
                f"{file.name}: holds 8 bits a value, too few for depth in metres; it may be a picture to look at: save "
                "depth as 16-bit PNG"
            )
        if self.integers and stored.dtype != np.uint16:
            raise UserError(f"{file.name}: holds {stored.dtype} values; {self.name} stores depth as 16-bit PNG")
        with np.errstate(invalid="ignore", over="ignore"):
            valid = np.isfinite(stored) & (stored > 0)
            metres = np.where(valid, self._metres(np.where(valid, stored, 1)), 0).astype(np.float32)
        if self.reach is not None and metres.max() > self.reach.farthest[1]:
            raise UserError(self._complaint(file.name, measure([metres])))
        return metres

    def _metres(self, stored: np.ndarray) -> np.ndarray:
        if self.units_per_metre is not None:
            return stored / np.float64(self.units_per_metre)
        assert self.near is not None, "inverse depth has a scale"
        return 65535 * self.near / stored.astype(np.float64)

    def check_unit(self, where: str, maps: Sequence[np.ndarray]) -> None:
        """Refuse maps of a data set that are, taken together, in another unit, or hold nothing.

        Args:
            where: what the maps belong to, for the message.
            maps: of ``read``; several, as one may show a wall at arm's length.
        """
        if maps and not any(metres.any() for metres in maps):
            raise UserError(f"{where}: {len(maps)} maps that were looked at hold no valid depth; make them again")
        maps = [metres for metres in maps if metres.any()]
        if self.reach is None or not maps:
            return
        found = measure(maps)
        low = found.farthest < self.reach.farthest[0] and found.typical < self.reach.typical[0]
        if low or found.farthest > self.reach.farthest[1] or found.typical > self.reach.typical[1]:
            raise UserError(self._complaint(where, found))

    def _complaint(self, where: str, found: Measured) -> str:
        assert self.reach is not None, "without it there is nothing to complain about"
        assert self.units_per_metre is not None, "inverse maps have no reach"
        scale = self.units_per_metre
        fitting = [name for other, name in _UNITS.items() if other != scale and self._fits(found, scale / other)]
        unit = _UNITS.get(scale, f"value / {scale:g}")
        looks = f"it looks like {fitting[0]}" if fitting else "no usual unit fits"
        return (
            f"{where}: depths reach {found.farthest:.4g} m with a median of {found.typical:.4g} m if stored as {unit}, "
            f"but {self.reach.expected}: {looks}; {self.reach.remedy}"
        )

    def _fits(self, found: Measured, factor: float) -> bool:
        assert self.reach is not None
        (low, high), (nearest, most) = self.reach.farthest, self.reach.typical
        return low <= found.farthest * factor <= high and nearest <= found.typical * factor <= most


def measure(maps: Sequence[np.ndarray]) -> Measured:
    """The largest depth of maps in metres, and the median of their medians; 0 is no depth, and each has some."""
    medians = [float(np.median(metres[metres > 0])) for metres in maps]
    return Measured(max(float(metres.max()) for metres in maps), float(np.median(medians)))
