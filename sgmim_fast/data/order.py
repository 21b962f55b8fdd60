"""Which sample comes when: functions of (seed, epoch) that no number of ranks or workers changes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_ORDER, sample_rng

LANES = 64
"""Places of a sharded data set that are read at the same time; ranks share them out evenly if they divide this."""


@dataclass(frozen=True)
class Place:
    """Where in the order a run is: what a loader is restored from."""

    epoch: int = 0
    taken: int = 0
    """Samples of the epoch's permutation that all ranks together have taken."""


BEGIN = Place()
"""Of a run."""


@dataclass(frozen=True)
class LoaderState:
    """How far a run's data had come; written into every checkpoint."""

    epoch: int
    taken: int
    pairs: str
    """sha-256 of the list of pairs."""
    seed: int
    shuffle_buffer: int
    batch_size: int
    accumulation_steps: int
    world_size: int

    @property
    def place(self) -> Place:
        return Place(self.epoch, self.taken)

    @property
    def step_size(self) -> int:
        """Pairs of one optimizer step over all ranks."""
        return self.batch_size * self.accumulation_steps * self.world_size

    def differences(self, other: "LoaderState") -> dict[str, tuple[object, object]]:
        """What would make another order of the samples, as option -> (here, there).

        Batch size, accumulation and the number of ranks may differ: the order stays the same.
        """
        named = {"pairs of --data.path (sha-256)": "pairs", "--train.seed": "seed"}
        named["--data.shuffle-buffer"] = "shuffle_buffer"
        both = {option: (getattr(self, name), getattr(other, name)) for option, name in named.items()}
        return {option: values for option, values in both.items() if values[0] != values[1]}


class SampleOrder:
    """Which samples each micro-batch holds.

    An epoch is a permutation drawn from (seed, epoch). An optimizer step takes the next A * B * W of it (A
    micro-steps, B pairs a micro-batch, W ranks); within a micro-step rank r takes every W-th, from the r-th on. So W
    ranks of B pairs see in each step what one rank of W * B sees, and a run that goes on with other A, B or W goes on
    with the same samples. An incomplete last step is dropped.

    Args:
        shard_sizes: pairs in each shard, in the order of their indices; None permutes all samples freely.
        shuffle_buffer: with shards, samples in reach of each other; more are mixed better, fewer read closer together.
            0 permutes all samples freely.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        world_size: int,
        accumulation_steps: int,
        seed: int,
        shard_sizes: Sequence[int] | None = None,
        shuffle_buffer: int = 0,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.world_size = world_size
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self.shard_sizes = shard_sizes
        self.shuffle_buffer = shuffle_buffer
        self.step_size = accumulation_steps * world_size * batch_size
        self.steps_per_epoch = samples // self.step_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"the data set has {samples} pairs but one optimizer step takes {self.step_size} "
                f"(batch size {batch_size} x {world_size} rank(s) x {accumulation_steps} accumulation step(s)); "
                "lower --train.batch-size or add pairs"
            )

    def permutation(self, epoch: int) -> np.ndarray:
        """Dataset indices of one epoch in order, (samples,) int64."""
        rng = sample_rng(self.seed, epoch, 0, STREAM_ORDER)
        if self.shard_sizes is None or not self.shuffle_buffer:
            return rng.permutation(self.samples)
        return shard_permutation(rng, self.shard_sizes, self.shuffle_buffer)

    def micro_batches(self, rank: int, place: Place = BEGIN) -> Iterator[tuple[int, np.ndarray]]:
        """Endless (epoch, dataset indices (B,)) of one rank's micro-batches from a place on."""
        epoch, taken = place.epoch, place.taken
        while True:
            order = self.permutation(epoch)
            for begin in range(taken, self.samples - self.step_size + 1, self.step_size):
                step = order[begin : begin + self.step_size]
                for micro in step.reshape(self.accumulation_steps, self.batch_size, self.world_size):
                    yield epoch, micro[:, rank]
            epoch, taken = epoch + 1, 0

    def advance(self, place: Place, steps: int) -> Place:
        """Where a run is after so many more optimizer steps."""
        left = (self.samples - place.taken) // self.step_size
        if steps < left:
            return Place(place.epoch, place.taken + steps * self.step_size)
        epochs, within = divmod(steps - left, self.steps_per_epoch)
        return Place(place.epoch + 1 + epochs, within * self.step_size)

    def state(self, place: Place, fingerprint: str) -> LoaderState:
        """What a checkpoint keeps about loading.

        Args:
            fingerprint: sha-256 of the list of pairs.
        """
        return LoaderState(
            epoch=place.epoch,
            taken=place.taken,
            pairs=fingerprint,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer if self.shard_sizes is not None else 0,
            batch_size=self.batch_size,
            accumulation_steps=self.accumulation_steps,
            world_size=self.world_size,
        )


def shard_permutation(rng: np.random.Generator, shard_sizes: Sequence[int], shuffle_buffer: int) -> np.ndarray:
    """All samples of a sharded data set, mixed, yet so that each shard is read from one end to the other.

    The shards are put in random order and the line of their samples is cut into ``LANES`` equal lanes. Each lane is
    shuffled within a sliding buffer, and the lanes take turns: position j of the result is of lane j modulo ``LANES``.

    Args:
        shuffle_buffer: samples in all lanes' buffers together.

    Returns:
        (samples,) int64, a permutation.
    """
    begins = np.concatenate(([0], np.cumsum(shard_sizes)))
    line = np.concatenate([np.arange(begins[i], begins[i + 1]) for i in rng.permutation(len(shard_sizes))])
    lanes = min(LANES, len(line))
    window = max(1, shuffle_buffer // lanes)
    mixed = [_mix(rng, lane, window) for lane in np.array_split(line, lanes)]
    # The first len(line) % lanes lanes are longer by one, so their last samples close the epoch in turn.
    short = min(map(len, mixed))
    turns = np.stack([lane[:short] for lane in mixed], axis=1).reshape(-1)
    return np.concatenate([turns, *(lane[short:] for lane in mixed)])


def _mix(rng: np.random.Generator, lane: np.ndarray, window: int) -> np.ndarray:
    """Shuffle within blocks of ``window``, then within blocks that begin half-way, so that samples cross borders."""
    for begin in (0, window // 2):
        cuts = range(begin, len(lane), window)[0 if begin else 1 :]
        lane = np.concatenate([rng.permutation(block) for block in np.split(lane, list(cuts))])
    return lane
