"""Hold the calculation of ``sgmim plan`` against measured steps of one and two ranks of this machine's CPU.

    python -m benchmarks.scaling --rounds 24

Two ranks of one thread each communicate through gloo over the loopback device. Measured in turns, round by round: the
links (seconds of each collective by its size), steps of one rank alone, steps of two single ranks side by side, which
tells how much two busy cores slow each other down without any communication, and steps of two ranks that train one
model. The steps of two ranks are then calculated as ``sgmim plan`` does, from the steps side by side and the links:
the latency and bandwidth of each kind of collective fitted to its own times, because gloo's algorithms differ. Rows go
to ``benchmarks/results/scaling.jsonl``. On a machine that others use as well, only the quarter of the rounds counts
during which other processes took least of it, for each thing measured; rows tell how much that still was.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quiet import quietest, watched
from sgmim_fast.errors import UserError, one_line_errors
from sgmim_fast.planning.collectives import KINDS, Cluster, Kind, Link, fit_link, ring_seconds
from sgmim_fast.planning.parameters import ParameterSizes
from sgmim_fast.planning.step_time import step_time
from sgmim_fast.planning.traffic import Traffic, step_traffic

RESULTS = harness.RESULTS / "scaling.jsonl"
MODEL = {"image_size": 64, "embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
STAGES = (0, 1, 2, 3)
PAYLOADS = tuple(1 << power for power in (3, *range(10, 27, 2)))  # bytes; 8 B to 64 MB
COLLECTIVES = 5  # of each kind and size a round
RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24, help="of everything")
    parser.add_argument("--steps", type=int, default=3, help="of each kind a round")
    parser.add_argument("--batch", type=int, default=8, help="pairs a rank")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the rounds, the quietest, that count")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    with one_line_errors():
        measure(parser.parse_args())


class Worker:
    """A rank that does as it is told."""

    def __init__(self, rank: int, ranks: int, port: int, batch: int) -> None:
        environment = {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        }
        words = ["-m", "benchmarks.scaling_worker", "--model", json.dumps(MODEL), "--batch", str(batch)]
        self.process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise UserError("a rank has ended before it answered; its own message says why")


@contextmanager
def workers(ranks: int, batch: int) -> Iterator[list[Worker]]:
    """Joined ranks, or one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [Worker(rank, ranks, port, batch) for rank in range(ranks)]
    try:
        yield started
    finally:
        for worker in started:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        for worker in started:
            try:
                worker.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def together(group: list[Worker], **order: Any) -> list[Any]:
    """Give all the same order; their answers."""
    for worker in group:
        worker.tell(**order)
    return [worker.answer() for worker in group]


def time_links(pair: list[Worker], kind: Kind) -> dict[int, list[float]]:
    """Seconds of one kind of collective by payload; each takes as long as it takes the slower rank."""
    return {
        payload: list(map(max, *together(pair, do="link", kind=kind, payload=payload, count=COLLECTIVES)))
        for payload in PAYLOADS
    }


@dataclass
class Times:
    """Seconds of the steps of the rounds that count."""

    passes: list[float]
    """Forward and backward."""
    optimizers: list[float]
    others: float
    """Most that other processes took of the machine meanwhile."""

    @classmethod
    def of(cls, parts: list[tuple[list[dict[str, list[float]]], float]], keep: float) -> "Times":
        kept = quietest(parts, keep)
        answers = [answer for part, _ in kept for answer in part]
        return cls(
            [second for answer in answers for second in answer["passes"]],
            [second for answer in answers for second in answer["optimizers"]],
            kept[-1][1],
        )

    @property
    def steps(self) -> list[float]:
        return [a + b for a, b in zip(self.passes, self.optimizers, strict=True)]


def measure(options: argparse.Namespace) -> None:
    """Everything, then a row for each kind of collective and each stage."""
    rows = harness.Rows(options.output, torch.device("cpu"))
    links: dict[Kind, list[Any]] = {kind: [] for kind in KINDS}
    alone, side, joined = ([[] for _ in STAGES] for _ in range(3))  # type: tuple[list[list[Any]], ...]
    with ExitStack() as stack:
        groups = [stack.enter_context(workers(ranks, options.batch)) for ranks in (1, 1, RANKS)]
        for worker in (first for group in groups for first in group):
            sizes = worker.answer()["parameters"]
        (single, other), pair = [group[0] for group in groups[:2]], groups[2]
        pids = [worker.process.pid for group in groups for worker in group]
        parameters = ParameterSizes(tuple(map(tuple, sizes)))
        for number in range(options.rounds):
            for kind in KINDS:
                links[kind].append(watched(partial(time_links, pair, kind), pids))
            for stage in STAGES:
                order = {"do": "steps", "stage": stage, "count": options.steps}
                for found, group in ((alone, [single]), (side, [single, other]), (joined, pair)):
                    found[stage].append(watched(partial(together, group, **order), pids))
            print(f"round {number + 1} of {options.rounds}", flush=True)
        counts = [together(pair, do="count", stage=stage)[0] for stage in STAGES]
    fitted = {kind: record_link(rows, kind, quietest(links[kind], options.keep)) for kind in KINDS}
    for stage in STAGES:
        times = [Times.of(parts[stage], options.keep) for parts in (alone, side, joined)]
        row = {
            "benchmark": "scaling",
            "part": "step",
            "model": MODEL,
            "parameters": parameters.count,
            "batch": options.batch,
            "zero_stage": stage,
            "precision": "fp32",
            "backend": "gloo, loopback",
            "ranks": RANKS,
            "threads_a_rank": 1,
            "rounds": options.rounds,
            "rounds_kept": len(quietest(joined[stage], options.keep)),
            "steps_kept": len(times[2].steps) // RANKS,
            "others_share": max(part.others for part in times),
            **compare(stage, parameters, fitted, *times, stage_0=Times.of(side[0], options.keep)),
            **compare_bytes(counts[stage], parameters, stage),
        }
        rows.append(row)
        print(
            f"ZeRO {stage}: {row['measured_seconds'] * 1e3:.1f} ms measured, {row['predicted_seconds'] * 1e3:.1f} "
            f"predicted ({row['relative_error']:+.1%}), from stage 0 alone {row['relative_error_from_stage_0']:+.1%}, "
            f"others took {row['others_share']:.0%}; bytes {row['counted_bytes'] == row['predicted_bytes']}"
        )


def record_link(rows: harness.Rows, kind: Kind, parts: list[tuple[dict[int, list[float]], float]]) -> Link:
    """Fit one kind of collective to the medians of its times."""
    seconds = {payload: [second for part, _ in parts for second in part[payload]] for payload in PAYLOADS}
    medians = {payload: median(times) for payload, times in seconds.items()}
    link = fit_link(medians, kind, RANKS)
    fit = {payload: ring_seconds(kind, payload, RANKS, link) for payload in medians}
    rows.append(
        {
            "benchmark": "scaling",
            "part": "link",
            "kind": kind,
            "backend": "gloo, loopback",
            "ranks": RANKS,
            "rounds_kept": len(parts),
            "others_share": parts[-1][1],
            "latency_seconds": link.latency,
            "bytes_per_second": link.bandwidth,
            "payload_bytes": list(medians),
            "p50_seconds": list(medians.values()),
            "p20_seconds": [harness.percentiles(times)[0] for times in seconds.values()],
            "fit_relative_error": [fit[payload] / medians[payload] - 1 for payload in medians],
        }
    )
    print(f"{kind}: {link.latency * 1e6:.0f} us a hop, {link.bandwidth / 1e9:.2f} GB/s")
    return link


def predicted(
    stage: int, parameters: ParameterSizes, fitted: dict[Kind, Link], micro_step: float, optimizer: float
) -> tuple[float, float]:
    """Seconds of a step of two ranks, and of its communication, from those of a single rank."""
    traffic = step_traffic(parameters, stage=stage, precision="fp32", gpus=RANKS)
    found = [
        step_time(
            [part],
            gpus=RANKS,
            cluster=Cluster(gpus_per_node=RANKS, inside=fitted[part.kind], between=fitted[part.kind]),
            micro_step=micro_step,
            optimizer=optimizer / (RANKS if stage > 0 else 1),
        )
        for part in traffic
    ]
    communication = sum(time.exposed for time in found)
    return found[0].compute + communication, communication


def compare(
    stage: int,
    parameters: ParameterSizes,
    fitted: dict[Kind, Link],
    alone: Times,
    side: Times,
    joined: Times,
    *,
    stage_0: Times,
) -> dict[str, Any]:
    """Predicted and measured seconds of a stage: from its own single-rank steps, and from those of stage 0."""

    def seconds(times: Times) -> tuple[float, float]:
        return predicted(stage, parameters, fitted, median(times.passes), median(times.optimizers))

    p20, p50, p80 = harness.percentiles(joined.steps)
    total, communication = seconds(side)
    from_stage_0, _ = seconds(stage_0)
    single, busy = median(alone.steps), median(side.steps)
    return {
        "alone_seconds": single,
        "side_by_side_seconds": busy,
        "side_by_side_slowdown": busy / single,
        "side_by_side_pass_seconds": median(side.passes),
        "side_by_side_optimizer_seconds": median(side.optimizers),
        "predicted_communication_seconds": communication,
        "predicted_seconds": total,
        "predicted_seconds_from_stage_0": from_stage_0,
        "p20_seconds": p20,
        "measured_seconds": p50,
        "p80_seconds": p80,
        "relative_error": total / p50 - 1,
        "relative_error_from_stage_0": from_stage_0 / p50 - 1,
        # What a plan without communication would say: the error that the model of communication has to remove.
        "relative_error_without_communication": (total - communication) / p50 - 1,
        "efficiency_measured": single / p50,
        "efficiency_predicted": single / total,
    }


def compare_bytes(calls: list[tuple[str, int]], parameters: ParameterSizes, stage: int) -> dict[str, Any]:
    """Payload bytes and collectives of a step by kind, counted and by formula."""
    counted, number = Counter[str](), Counter[str]()
    for kind, payload in calls:
        counted[kind] += payload
        number[kind] += 1
    expected, expected_number = Counter[str](), Counter[str]()
    traffic: list[Traffic] = step_traffic(parameters, stage=stage, precision="fp32", gpus=RANKS)
    for part in traffic:
        expected[part.kind] += part.payload
        expected_number[part.kind] += part.calls
    return {
        "counted_bytes": dict(sorted(counted.items())),
        "predicted_bytes": dict(sorted(expected.items())),
        "counted_collectives": dict(sorted(number.items())),
        "predicted_collectives": dict(sorted(expected_number.items())),
    }


if __name__ == "__main__":
    main()
