"""What a plan is made from. What is not given is assumed, and named as an assumption in the output."""

from dataclasses import dataclass
from typing import Any, cast

from sgmim_fast.config.checks import require
from sgmim_fast.planning.assumed import ASSUMED
from sgmim_fast.planning.collectives import Cluster, Link
from sgmim_fast.planning.measured import Measured
from sgmim_fast.planning.parameters import ParameterSizes, Precision


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a plan depends on, in the units of the command's options."""

    measured: Measured
    parameters: ParameterSizes
    gpus: tuple[int, ...] = tuple(2**n for n in range(11))
    """How many to plan for."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """Of ZeRO."""
    global_batch: int | None = None
    """Pairs an optimizer step on all GPUs; None leaves the measured batch to each GPU."""
    given: frozenset[str] = frozenset()
    """Names among ``ASSUMED`` that are not assumed here."""
    loader_rate: float | None = None
    """Pairs a second that the loaders of a node deliver; None asks for as many as are needed."""
    storage_read: float | None = None
    """GB/s that the storage gives to all nodes together; None for as much as is needed."""
    async_checkpoint: bool = False
    price: float | None = None
    """Of a GPU for an hour, in any currency."""

    intra_node: float = ASSUMED["intra_node"].value
    inter_node: float = ASSUMED["inter_node"].value
    intra_latency: float = ASSUMED["intra_latency"].value
    inter_latency: float = ASSUMED["inter_latency"].value
    gpus_per_node: int = int(ASSUMED["gpus_per_node"].value)
    memory_bandwidth: float = ASSUMED["memory_bandwidth"].value
    overlap: float = ASSUMED["overlap"].value
    bucket_size: int = int(ASSUMED["bucket_size"].value)
    accumulation: int = int(ASSUMED["accumulation"].value)
    images: int = int(ASSUMED["images"].value)
    epochs: int = int(ASSUMED["epochs"].value)
    pair_bytes: float = ASSUMED["pair_bytes"].value
    checkpoint_write: float = ASSUMED["checkpoint_write"].value
    checkpoint_every: int = int(ASSUMED["checkpoint_every"].value)
    host_copy: float = ASSUMED["host_copy"].value

    def __post_init__(self) -> None:
        require(
            0 < self.measured.images_per_second < float("inf"),
            f"--images-per-second {self.measured.images_per_second} must be a positive number",
        )
        require(self.measured.batch >= 1, f"--batch {self.measured.batch} must be 1 or more")
        for name in ("gpus_per_node", "bucket_size", "accumulation", "images", "epochs", "checkpoint_every"):
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        for name in (
            "intra_node", "inter_node", "memory_bandwidth", "pair_bytes", "checkpoint_write", "host_copy",
        ):  # fmt: skip
            self._require(name, 0 < getattr(self, name) < float("inf"), "must be positive")
        for name in ("loader_rate", "storage_read", "global_batch"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < float("inf"), "must be positive")
        for name in ("intra_latency", "inter_latency"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "must be 0 or more")
        self._require("price", self.price is None or 0 <= self.price < float("inf"), "must be 0 or more")
        self._require("overlap", 0 <= self.overlap <= 1, "must be a share from 0 to 1")
        require(bool(self.gpus), "--gpus names no number; name at least one")
        for count in self.gpus:
            require(count >= 1, f"--gpus {count} must be 1 or more")
            self.cluster.nodes(count)
        for stage in self.stages:
            require(stage in (0, 1, 2, 3), f"--stages {stage} must be 0, 1, 2 or 3")
        require(
            self.precision != "bf16" or self.stages != (0,),
            "--stages 0 cannot train in bf16: DeepSpeed's stage 0 takes a wrong first Adam step; choose 1, 2 or 3",
        )

    def _require(self, name: str, condition: bool, message: str) -> None:
        require(condition, f"--{name.replace('_', '-')} {getattr(self, name)} {message}")

    @property
    def precision(self) -> Precision:
        """Of the weights."""
        return cast(Precision, self.measured.precision)

    @property
    def cluster(self) -> Cluster:
        """In seconds and bytes."""
        return Cluster(
            gpus_per_node=self.gpus_per_node,
            inside=Link(latency=self.intra_latency * 1e-6, bandwidth=self.intra_node * 1e9),
            between=Link(latency=self.inter_latency * 1e-6, bandwidth=self.inter_node * 1e9 / 8),
        )

    def assumptions(self) -> dict[str, str]:
        """What was assumed, by option: value, unit and origin."""
        return {
            f"--{name.replace('_', '-')}": f"{part.value:,.10g} {part.unit} ({part.origin})".replace("  ", " ")
            for name, part in ASSUMED.items()
            if name not in self.given
        }

    def as_dict(self) -> dict[str, Any]:
        """For machines: options and values."""
        names = ("gpus", "stages", "global_batch", "loader_rate", "storage_read", "async_checkpoint", "price", *ASSUMED)
        return {
            "source": self.measured.source,
            "model": self.measured.model,
            "overrides": self.measured.overrides,
            "parameters": self.parameters.count,
            "precision": self.precision,
            "batch": self.measured.batch,
            "images_per_second": self.measured.images_per_second,
            **{name: getattr(self, name) for name in names},
        }
