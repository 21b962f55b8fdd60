"""The formulas of `sgmim plan`, each held against numbers worked out by hand."""

import pytest

from sgmim_fast.errors import UserError
from sgmim_fast.planning.checkpoints import checkpoint_size, checkpoint_time
from sgmim_fast.planning.collectives import KINDS, Cluster, Kind, Link, fit_link, ring_seconds, seconds, wire_bytes
from sgmim_fast.planning.memory import state_memory
from sgmim_fast.planning.model_sizes import sizes_of
from sgmim_fast.planning.parameters import ParameterSizes
from sgmim_fast.planning.step_time import optimizer_seconds, step_time
from sgmim_fast.planning.traffic import bucket_count, step_traffic

FREE = Link(latency=0.0, bandwidth=float("inf"))
PARAMETERS = ParameterSizes(((400_000, 250_001), (1_000, 99)))


def volumes(stage: int, **options: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Payload and calls by kind and what, without scalars."""
    traffic = step_traffic(PARAMETERS, stage=stage, precision="fp32", gpus=4, **options)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for part in traffic:
        if part.what != "scalars":
            payload, calls = found.get((part.kind, part.what), (0, 0))
            found[part.kind, part.what] = payload + part.payload, calls + part.calls
    return found


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-reduce", 1.75e6), ("all-gather", 0.875e6), ("reduce-scatter", 0.875e6)]
)
def test_a_ring_sends_its_share_and_hops(kind: Kind, sent: float) -> None:
    assert wire_bytes(kind, 1e6, 8) == pytest.approx(sent)
    hops = 14 if kind == "all-reduce" else 7
    assert ring_seconds(kind, 1e6, 8, Link(latency=2e-6, bandwidth=1e9)) == pytest.approx(hops * 2e-6 + sent / 1e9)
    assert ring_seconds(kind, 1e6, 1, Link(latency=1.0, bandwidth=1.0)) == 0


def test_the_node_reduces_before_the_network_does() -> None:
    """Two nodes of four: each GPU keeps a quarter of 8 MB, and four such rings share the node's 1 GB/s."""
    network = Cluster(gpus_per_node=4, inside=FREE, between=Link(latency=0.0, bandwidth=1e9))
    assert seconds("all-reduce", 8e6, 8, network) == pytest.approx(8e-3)  # 2 (M - 1) / M of 8 MB through each node
    assert seconds("all-gather", 8e6, 8, network) == pytest.approx(4e-3)
    assert seconds("reduce-scatter", 8e6, 8, network) == pytest.approx(4e-3)
    bus = Cluster(gpus_per_node=4, inside=Link(latency=0.0, bandwidth=1e9), between=FREE)
    assert seconds("all-reduce", 8e6, 8, bus) == pytest.approx(12e-3)
    assert seconds("all-gather", 8e6, 8, bus) == pytest.approx(6e-3)
    hop = Link(latency=1.0, bandwidth=float("inf"))
    assert seconds("all-reduce", 8e6, 8, Cluster(gpus_per_node=4, inside=hop, between=hop)) == 3 + 2 + 3


@pytest.mark.parametrize("kind", KINDS)
def test_one_node_is_one_ring(kind: Kind) -> None:
    link = Link(latency=3e-6, bandwidth=4e9)
    cluster = Cluster(gpus_per_node=8, inside=link, between=Link(latency=9.0, bandwidth=1.0))
    assert seconds(kind, 5e6, 8, cluster) == pytest.approx(ring_seconds(kind, 5e6, 8, link))


def test_nodes_must_be_full() -> None:
    cluster = Cluster(gpus_per_node=8, inside=FREE, between=FREE)
    assert [cluster.nodes(gpus) for gpus in (1, 5, 8, 24)] == [1, 1, 1, 3]
    with pytest.raises(UserError, match="--gpus 12 does not fill nodes of 8"):
        cluster.nodes(12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_finds_the_link(kind: Kind) -> None:
    link = Link(latency=7e-5, bandwidth=3e9)
    measured = {payload: ring_seconds(kind, payload, 2, link) for payload in (8, 1e4, 1e6, 1e8)}
    found = fit_link(measured, kind, 2)
    assert found.latency == pytest.approx(link.latency)
    assert found.bandwidth == pytest.approx(link.bandwidth)
    # Twice as slow here, twice as fast there: the geometric mean.
    noisy = {payload: time * factor for (payload, time), factor in zip(measured.items(), (2, 0.5, 2, 0.5), strict=True)}
    assert fit_link(noisy, kind, 2).latency == pytest.approx(link.latency, rel=0.25)


def test_traffic_by_stage() -> None:
    """651,100 parameters, of which 1,099 are small; 4 ranks; 250,001 is filled up to a multiple."""
    assert volumes(0) == {("all-reduce", "gradients"): (4 * 651_100, 1)}
    gathered = 4 * (650_008 + 1_104)  # groups filled up to multiples of 2 x 4
    assert volumes(1) == {
        ("all-reduce", "gradients"): (4 * 651_100, 1),
        ("all-gather", "weights"): (gathered, 2),
    }
    assert volumes(2) == volumes(1)
    assert volumes(3) == {
        ("all-gather", "weights"): (4 * (650_004 + 1_100), 1 + 2),
        ("reduce-scatter", "gradients"): (4 * (650_004 + 1_100), 1),
    }


def test_what_accumulation_repeats() -> None:
    assert volumes(0, accumulation=3) == volumes(0)
    assert volumes(1, accumulation=3) == volumes(1)
    assert volumes(2, accumulation=3)["all-reduce", "gradients"] == (3 * 4 * 651_100, 3)
    assert volumes(2, accumulation=3)["all-gather", "weights"] == volumes(2)["all-gather", "weights"]
    assert volumes(3, accumulation=3) == {
        ("all-gather", "weights"): (4 * (3 * 650_004 + 1_100), 3 + 2),  # small weights once a step
        ("reduce-scatter", "gradients"): (3 * 4 * 651_104, 3),
    }


def test_bf16_halves_the_bytes_and_one_gpu_sends_none() -> None:
    (_, _, _, gradients, *_) = step_traffic(PARAMETERS, stage=1, precision="bf16", gpus=4)
    assert (gradients.what, gradients.payload) == ("gradients", 2 * 651_100)
    assert all(step_traffic(PARAMETERS, stage=stage, precision="fp32", gpus=1) == [] for stage in range(4))


def test_large_models_gather_twice_at_stage_3() -> None:
    """Of 2e9 weights, all but those of the last 5e8 lie more than 1e9 away from their second use."""
    large = ParameterSizes(((200_000_000,) * 10,))
    weights = next(part for part in step_traffic(large, stage=3, precision="bf16", gpus=8) if part.what == "weights")
    assert weights.payload == 2 * (2_000_000_000 + 1_500_000_000)


def test_buckets() -> None:
    assert bucket_count((5, 5, 5), 10) == 2
    assert bucket_count((11, 5, 5), 10) == 2
    assert bucket_count((6, 6, 6), 10) == 3
    gradients = step_traffic(PARAMETERS, stage=1, precision="fp32", gpus=4, bucket_size=400_000)[2]
    assert (gradients.calls, gradients.beside) == (2, 0.5)
    stage_0 = step_traffic(PARAMETERS, stage=0, precision="fp32", gpus=4, bucket_size=400_000)[-1]
    assert (stage_0.calls, stage_0.beside) == (1, 0.0)


def test_only_what_can_run_beside_is_hidden() -> None:
    traffic = step_traffic(PARAMETERS, stage=1, precision="fp32", gpus=4, bucket_size=400_000)
    cluster = Cluster(gpus_per_node=8, inside=Link(latency=0.0, bandwidth=1e6), between=FREE)
    options = {"gpus": 4, "cluster": cluster, "optimizer": 0.25, "accumulation": 2}
    open_ = step_time(traffic, micro_step=100.0, **options)
    assert open_.compute == pytest.approx(200.25)
    assert (
        open_.exposed == pytest.approx(open_.communication) == pytest.approx((1.5 * 2_604_408 + 0.75 * 2_604_448) / 1e6)
    )
    half = step_time(traffic, micro_step=100.0, overlap=0.5, **options)
    assert open_.exposed - half.exposed == pytest.approx(0.5 * 0.5 * 1.5 * 2.6044)
    # No more hides than the backward passes have time for.
    short = step_time(traffic, micro_step=0.03, overlap=1.0, **options)
    assert short.communication - short.exposed == pytest.approx(2 * 0.02)
    waiting = step_time(traffic, micro_step=100.0, loading=300.0, **options)
    assert waiting.total == pytest.approx(300)
    assert waiting.data_wait == pytest.approx(300 - open_.total)


def test_the_optimizer_is_shared_from_stage_1_on() -> None:
    options = {"precision": "fp32", "memory_bandwidth": 28e6}
    assert optimizer_seconds(1_000_000, stage=0, gpus=8, **options) == pytest.approx(1.0)
    assert optimizer_seconds(1_000_000, stage=1, gpus=8, **options) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "fp32", (4, 4, 8, 4)),
        (1, "fp32", (4, 1, 3, 4 * 5)),
        (1, "bf16", (2, 0.5, 3, 2 * 5)),
        (2, "bf16", (2, 0.5, 3, 2 * 5)),
        (3, "bf16", (0.5 + 2, 0.5, 3, 2 * 5)),
    ],
)
def test_memory_of_weights_gradients_and_optimizer(stage: int, precision: str, expected: tuple[float, ...]) -> None:
    """A million parameters on four GPUs, a bucket of five million."""
    million = ParameterSizes(((250_000,) * 4,))
    found = state_memory(million, stage=stage, precision=precision, gpus=4, bucket_size=5_000_000)  # type: ignore[arg-type]
    parts = (found.weights, found.gradients, found.optimizer, found.buckets)
    assert parts == pytest.approx([part * 1e6 for part in expected])
    assert found.total == pytest.approx(sum(expected) * 1e6)


def test_checkpoints() -> None:
    million = ParameterSizes(((1_000_000,),))
    sizes = [checkpoint_size(million, stage=stage, precision="bf16", gpus=4) for stage in (1, 3)]
    assert [size.total for size in sizes] == [18e6, 16e6]
    assert [size.first_rank for size in sizes] == [9e6, 7e6]
    time = checkpoint_time(sizes[0], write_speed=1e6, copy_speed=9e6, interval=15.0)
    assert (time.write, time.stall_synchronous, time.stall_asynchronous) == (18.0, 18.0, 1.0 + 3.0)


def test_a_model_is_counted_without_its_memory() -> None:
    sizes = sizes_of("sgmim_swin_base", {"depths": (2, 2, 2, 2)})
    whole = sizes_of("sgmim_swin_base", {})
    assert len(sizes.groups) == 2
    # 16 blocks of 512 channels fewer: 12 x 512^2 in matrices, 13 x 512 in norms and biases, a table of 11 x 11 x 16.
    assert whole.count - sizes.count == 16 * (12 * 512**2 + 13 * 512 + 121 * 16)
    assert sum(whole.persistent) + sum(whole.partitioned) == whole.count
