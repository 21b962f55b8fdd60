"""The order of samples: shared by ranks, resumable anywhere, the same for any number of ranks, local for shards."""

from itertools import islice

import numpy as np
import pytest

from sgmim_fast.data.order import BEGIN, LANES, Place, SampleOrder, shard_permutation
from sgmim_fast.errors import UserError


def order_of(samples: int = 100, batch: int = 12, ranks: int = 1, accumulation: int = 1, seed: int = 3) -> SampleOrder:
    return SampleOrder(samples, batch_size=batch, world_size=ranks, accumulation_steps=accumulation, seed=seed)


def micro_batches(order: SampleOrder, rank: int, count: int, place: Place = BEGIN) -> list[tuple[int, list[int]]]:
    return [(epoch, indices.tolist()) for epoch, indices in islice(order.micro_batches(rank, place), count)]


def steps(order: SampleOrder, count: int, place: Place = BEGIN) -> list[tuple[int, set[int]]]:
    """Epoch and samples of each optimizer step over all ranks."""
    micro = order.accumulation_steps
    ranks = [micro_batches(order, rank, count * micro, place) for rank in range(order.world_size)]
    found = []
    for step in range(count):
        parts = [part for rank in ranks for part in rank[step * micro : (step + 1) * micro]]
        assert len({epoch for epoch, _ in parts}) == 1
        samples = [sample for _, part in parts for sample in part]
        assert len(samples) == len(set(samples)) == order.step_size
        found.append((parts[0][0], set(samples)))
    return found


@pytest.mark.parametrize(("batch", "ranks", "accumulation"), [(2, 3, 2), (3, 4, 1), (1, 2, 6), (6, 1, 2)])
def test_ranks_and_accumulation_share_each_steps_samples(batch: int, ranks: int, accumulation: int) -> None:
    assert steps(order_of(100, batch, ranks, accumulation), 20) == steps(order_of(), 20)


def test_an_epoch_holds_each_sample_once_and_drops_the_rest() -> None:
    order = order_of(103, 10, seed=0)
    batches = micro_batches(order, 0, 20)
    assert [epoch for epoch, _ in batches] == [0] * 10 + [1] * 10
    epochs = [[i for e, indices in batches if e == epoch for i in indices] for epoch in (0, 1)]
    for indices in epochs:
        assert len(indices) == len(set(indices)) == 100
        assert set(indices) <= set(range(103))
    assert epochs[0] != epochs[1]
    assert micro_batches(order_of(103, 10, seed=1), 0, 20) != batches


@pytest.mark.parametrize("step", [0, 3, 7, 8, 9, 21])
def test_order_starts_at_any_step(step: int) -> None:
    order = order_of(100, 2, 3, 2)
    whole = micro_batches(order, 1, 80)
    place = order.advance(BEGIN, step)
    assert micro_batches(order, 1, 20, place) == whole[2 * step : 2 * step + 20]
    assert order.advance(order.advance(BEGIN, step // 2), step - step // 2) == place


def test_other_ranks_go_on_with_the_same_samples() -> None:
    """Three steps on 3 ranks, then 2 ranks of another batch size: nothing is seen twice or left out."""
    before, after = order_of(100, 4, 3), order_of(100, 5, 2)
    place = before.advance(BEGIN, 3)
    state = before.state(place, "list")
    assert not state.differences(after.state(BEGIN, "list"))
    seen = [sample for _, step in steps(before, 3) for sample in step]
    seen += [sample for _, step in steps(after, 6, state.place) for sample in step]
    assert len(seen) == len(set(seen)) == 96
    assert steps(after, 7, state.place)[6][0] == 1, "64 samples are six steps of ten; then comes the next epoch"
    assert list(state.differences(order_of(seed=4).state(BEGIN, "another"))) == [
        "pairs of --data.path (sha-256)",
        "--train.seed",
    ]


def test_a_data_set_smaller_than_one_step() -> None:
    with pytest.raises(UserError, match=r"has 11 pairs but one optimizer step takes 12 .*lower --train.batch-size"):
        order_of(11, 2, 3, 2)
    assert order_of(11, 2, 2, 2).steps_per_epoch == 1


@pytest.mark.parametrize("sizes", [(100,), (50, 3, 47), (7,) * 40, (1,) * 90, (1000, 2000, 1500, 900, 1100, 777)])
@pytest.mark.parametrize("buffer", [1, 100, 10_000])
def test_shards_are_mixed_completely(sizes: tuple[int, ...], buffer: int) -> None:
    found = shard_permutation(np.random.default_rng(0), sizes, buffer)
    assert sorted(found.tolist()) == list(range(sum(sizes)))


def test_a_rank_reads_its_shards_from_end_to_end() -> None:
    sizes, buffer = (1000,) * 128, 64 * 100
    order = SampleOrder(
        sum(sizes), batch_size=32, world_size=8, accumulation_steps=1, seed=0, shard_sizes=sizes, shuffle_buffer=buffer
    )
    batches = np.array([indices for _, indices in micro_batches(order, 3, 400)])
    lanes = batches.reshape(400 * 32 // (LANES // 8), LANES // 8)  # this rank's lanes take turns
    steps = np.abs(np.diff(lanes, axis=0))
    assert np.quantile(steps, 0.95) < 3 * 100, "a lane moves within its buffer"
    assert len(np.unique(batches // 1000)) <= 2 * len(sizes) // 8, "a rank opens its share of the shards"
    assert np.abs(np.diff(lanes[:, 0])).min() > 0
    assert (np.diff(lanes[:90, 0]) != 1).mean() > 0.9, "samples of a buffer are shuffled"
