"""What is known of all pairs of a data set, and which of them are left out because of the others."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from sgmim_fast.data.pair_list import PairList
from sgmim_fast.data.verification.checks import Checked

_UNKNOWN, _GOOD, _BAD = 0, 1, 2
_RECORD = np.dtype(
    [
        ("state", np.uint8),
        ("value_type", np.uint8),  # place in the list of types
        ("height", np.int32),
        ("width", np.int32),
        ("sizes", np.int64, 2),
        ("digest", np.uint64, 2),
    ]
)


class Results:
    """Some 50 bytes a good pair; bad ones keep their reasons.

    Args:
        pairs: sorted, in the order of the indices.
    """

    def __init__(self, pairs: PairList) -> None:
        self.pairs = pairs
        self.remarks: Counter[str] = Counter()
        self._records = np.zeros(len(pairs), _RECORD)
        self._types = [""]
        self._reasons: dict[int, tuple[str, str]] = {}

    def put(self, index: int, checked: Checked) -> None:
        """Keep the result of one pair; only its first one counts."""
        record = self._records[index]
        if record["state"] != _UNKNOWN:
            return
        self.remarks.update(checked.remarks)
        if checked.kind:
            self._refuse(index, checked.kind, checked.reason)
            return
        if checked.value_type not in self._types:
            self._types.append(checked.value_type)
        digest = np.frombuffer(bytes.fromhex(checked.digest), np.uint64)
        sizes = (checked.stamp[0], max(checked.stamp[2], 0))
        value_type = self._types.index(checked.value_type)
        self._records[index] = (_GOOD, value_type, checked.height, checked.width, sizes, digest)

    def unknown(self) -> np.ndarray:
        """Places of the pairs without a result."""
        return np.flatnonzero(self._records["state"] == _UNKNOWN)

    def good(self) -> np.ndarray:
        """Places of the good pairs."""
        return np.flatnonzero(self._records["state"] == _GOOD)

    def refuse_minority_types(self) -> str:
        """Leave out maps whose values are of another type than most maps'; returns the type of those that stay.

        Of types that are equally frequent, 8 bits go first.
        """
        good = self.good()
        counts = np.bincount(self._records["value_type"][good], minlength=len(self._types))
        main = max(range(len(counts)), key=lambda i: (counts[i], self._types[i] != "uint8", self._types[i]))
        for index in good[self._records["value_type"][good] != main].tolist():
            found = self._types[self._records["value_type"][index]]
            self._refuse(
                index,
                "other value type",
                f"{self.pairs[index][1]}: holds {found} values, but most maps of the data set hold "
                f"{self._types[main]}; make it like the others, or remove the pair",
            )
        return self._types[main]

    def refuse_duplicates(self) -> None:
        """Leave out images whose bytes an earlier good pair has too."""
        good = self.good()
        digests = self._records["digest"][good]
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the same bytes stay in the order of the pairs
        differs = np.ones(len(order), bool)
        differs[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
        first = order[np.maximum.accumulate(np.where(differs, np.arange(len(order)), 0))]
        for index, original in sorted(zip(good[order[~differs]].tolist(), good[first[~differs]].tolist(), strict=True)):
            image, kept = self.pairs[index][0], self.pairs[original][0]
            self._refuse(index, "duplicate", f"{image}: the same bytes as {kept}; keep one (or --keep-duplicates)")

    def _refuse(self, index: int, kind: str, reason: str) -> None:
        self._records["state"][index] = _BAD
        self._reasons[index] = (kind, reason)

    def kinds(self) -> dict[str, int]:
        """How many pairs are left out, by kind of reason, the most frequent first."""
        return dict(Counter(kind for kind, _ in self._reasons.values()).most_common())

    def numbers(self, index: int) -> tuple[int, int, int, int]:
        """Bytes of image and map, height and width of a good pair."""
        record = self._records[index]
        first, second = record["sizes"].tolist()
        return first, second, int(record["height"]), int(record["width"])

    def refused(self) -> Iterator[tuple[int, str, str]]:
        """(place, kind, reason) of the pairs left out, in order."""
        for index in sorted(self._reasons):
            yield index, *self._reasons[index]
