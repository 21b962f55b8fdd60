"""How long a collective takes: rings, a latency for each hop and a bandwidth for the bytes (alpha-beta model).

A payload is the whole tensor: what an all-reduce sums, what an all-gather ends with, what a reduce-scatter begins with.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sgmim_fast.config.checks import require

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Link:
    """What carries bytes from one neighbour of a ring to the next."""

    latency: float
    """Seconds a hop takes whatever it carries."""
    bandwidth: float
    """Bytes a second in one direction."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs. The GPUs of a node share its network link and go through it all at a time."""

    gpus_per_node: int
    inside: Link
    """Between the GPUs of a node; the bandwidth is that of one GPU."""
    between: Link
    """Between nodes; the bandwidth is that of one node."""

    def nodes(self, gpus: int) -> int:
        """Nodes that ``gpus`` fill.

        Raises:
            UserError: if the last of several nodes would be part empty.
        """
        require(
            gpus <= self.gpus_per_node or gpus % self.gpus_per_node == 0,
            f"--gpus {gpus} does not fill nodes of {self.gpus_per_node} GPUs; choose a multiple, or another "
            "--gpus-per-node",
        )
        return -(-gpus // self.gpus_per_node)


def hops(kind: Kind, ranks: int) -> int:
    """Steps of a ring over ``ranks``: an all-reduce is a reduce-scatter and an all-gather."""
    return (2 if kind == "all-reduce" else 1) * (ranks - 1)


def wire_bytes(kind: Kind, payload: float, ranks: int) -> float:
    """Bytes that each rank of a ring sends, and receives."""
    return hops(kind, ranks) * payload / ranks


def ring_seconds(kind: Kind, payload: float, ranks: int, link: Link) -> float:
    """Seconds of one collective over a ring of equal links."""
    return hops(kind, ranks) * link.latency + wire_bytes(kind, payload, ranks) / link.bandwidth


def seconds(kind: Kind, payload: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of one collective over ``gpus``, within the nodes and between them one after the other.

    Within a node each GPU is left with a share of the payload (reduce-scatter), or begins with one (all-gather); the
    GPUs of one place in all nodes are rings of their own for that share, each with its part of the node's link.
    """
    nodes = cluster.nodes(gpus)
    local = gpus // nodes
    inner: Kind = "reduce-scatter" if kind == "all-reduce" else kind
    between = Link(latency=cluster.between.latency, bandwidth=cluster.between.bandwidth / local)
    found = ring_seconds(inner, payload, local, cluster.inside) + ring_seconds(kind, payload / local, nodes, between)
    return found + (ring_seconds("all-gather", payload, local, cluster.inside) if kind == "all-reduce" else 0.0)


def fit_link(measured: Mapping[float, float], kind: Kind, ranks: int) -> Link:
    """The link that explains measured seconds by payload of one kind of collective.

    Least squares of the logarithms, by repeated weighting, so that small payloads count as much as large ones. A
    latency that would come out negative is zero.
    """
    fit = dict(measured)
    link = Link(latency=0.0, bandwidth=1.0)
    for _ in range(20):
        # t = a * hops + b * wire, each equation divided by the geometric mean of t and its last fit.
        weights = {payload: 1 / math.sqrt(t * fit[payload]) for payload, t in measured.items()}
        rows = [
            (
                weights[payload] * hops(kind, ranks),
                weights[payload] * wire_bytes(kind, payload, ranks),
                weights[payload] * t,
            )
            for payload, t in measured.items()
        ]
        aa, ab, bb = sum(x * x for x, _, _ in rows), sum(x * y for x, y, _ in rows), sum(y * y for _, y, _ in rows)
        at, bt = sum(x * t for x, _, t in rows), sum(y * t for _, y, t in rows)
        determinant = aa * bb - ab * ab
        latency, inverse = (at * bb - bt * ab) / determinant, (bt * aa - at * ab) / determinant
        if latency < 0:
            latency, inverse = 0.0, bt / bb
        link = Link(latency=latency, bandwidth=1 / inverse)
        fit = {payload: ring_seconds(kind, payload, ranks, link) for payload in measured}
    return link
