"""What happens when a file turns out bad in the middle of a run: another pair stands in, up to a share."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_SUBSTITUTE, sample_rng

T = TypeVar("T")


class BadSample(NamedTuple):
    """One pair that could not be used, and which pair took its place."""

    epoch: int
    sample: int
    substitute: int
    reason: str


class Substitutes:
    """Chooses pairs that stand in for bad ones, and counts them.

    The choice is drawn from (seed, epoch, dataset index), so a resumed run and any number of ranks choose the same.

    Args:
        samples: pairs of the data set.
        max_share: more bad pairs than this share of ``samples`` end the run.
        tell: called with every bad sample, for logs.
        remedy: what to do once there are too many.
    """

    def __init__(
        self,
        samples: int,
        seed: int,
        max_share: float,
        tell: Callable[[BadSample], None],
        remedy: str = "`sgmim verify` finds them all",
    ) -> None:
        self.samples, self.seed, self.max_share, self.tell, self.remedy = samples, seed, max_share, tell, remedy
        self.count = 0
        """Substitutions so far."""
        self._bad: set[int] = set()

    def replace(self, epoch: int, index: int, error: UserError, make: Callable[[int], T]) -> T:
        """What ``make`` gives for a pair instead of ``index``, which raised ``error``.

        Raises:
            UserError: ``error``, extended, once too many pairs have been bad.
        """
        rng = sample_rng(self.seed, epoch, index, STREAM_SUBSTITUTE)
        tried = {index}
        while True:
            self._bad.add(index)
            self._check_share(error)
            candidate = index
            while candidate in tried:
                candidate = int(rng.integers(self.samples))
            tried.add(candidate)
            self.count += 1
            self.tell(BadSample(epoch, index, candidate, str(error)))
            try:
                return make(candidate)
            except UserError as another:
                index, error = candidate, another

    def _check_share(self, error: UserError) -> None:
        if len(self._bad) <= self.max_share * self.samples:
            return
        if not self.max_share:
            raise error
        raise UserError(
            f"{error} ({len(self._bad)} of {self.samples} pairs are bad, more than --data.max-bad-share "
            f"{self.max_share} allows; {self.remedy})"
        ) from error
