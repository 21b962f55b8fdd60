"""What a kind of training brings to the engine: its data, its model, its losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from sgmim_fast.config import Backend, RunConfig
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.order import Place, SampleOrder
from sgmim_fast.data.substitution import BadSample
from sgmim_fast.train.optim import parameter_groups

Config = TypeVar("Config", bound=RunConfig)


class Job(ABC, Generic[Config]):
    """One run's kind. The task that it makes is a module ``task(batch) -> NamedTuple``: scalar losses, the first of
    them the one that is minimised.

    Args:
        config: of the run.
    """

    kind: ClassVar[str]
    """Begins the names of curves."""
    doing: ClassVar[str]
    """What a progress bar calls it."""
    losses: ClassVar[tuple[str, ...]]
    """Fields of what the task gives; columns of metric rows."""
    sources: ClassVar[tuple[str, ...]]
    """Entries of a batch that were read from files."""
    fixed: ClassVar[tuple[str, ...]]
    """Settings, or beginnings of their names, that the stored state has the shape of."""
    free: ClassVar[tuple[str, ...]] = ()
    """Settings, or beginnings of their names, that change nothing of the training or are compared otherwise."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def check(self, device: torch.device) -> None:
        """Refuse choices beyond those of every run that cannot be on ``device``.

        Raises:
            UserError: with the reason and the remedy.
        """

    # -- data

    @abstractmethod
    def open(self) -> None:
        """Open the data, without which only ``order``, ``loader`` and ``sha256`` cannot be asked for.

        Raises:
            UserError: if it is not there or makes no sense.
        """

    @property
    @abstractmethod
    def samples(self) -> int:
        """Of the data set that is trained on."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Fingerprint of the list of samples."""

    @abstractmethod
    def order(self, world_size: int) -> SampleOrder:
        """The order of the samples."""

    @abstractmethod
    def loader(
        self,
        *,
        rank: int,
        world_size: int,
        place: Place,
        device: torch.device,
        tell: Callable[[BadSample], None],
    ) -> Loader:
        """One rank's micro-batches from ``place`` on."""

    # -- model

    @abstractmethod
    def make_task(self, device: torch.device | None, backend: Backend) -> nn.Module:
        """The task with initial weights; None makes it where tensors are made."""

    @abstractmethod
    def model(self, task: Any) -> nn.Module:
        """The part of the task whose weights are saved by name."""

    @abstractmethod
    def save(self, state: dict[str, Tensor], path: Path) -> None:
        """Write the fp32 state of ``model`` as safetensors."""

    @abstractmethod
    def meta_batch(self) -> dict[str, Tensor]:
        """A micro-batch as the loader makes it, without memory."""

    @abstractmethod
    def flops_per_image(self, backend: Backend = "torch") -> int:
        """Model FLOPs of one image's forward and backward pass."""

    @abstractmethod
    def parts(self, task: Any) -> Mapping[str, list[nn.Module]]:
        """The task's modules by the name that people read."""

    @abstractmethod
    def described(self) -> str:
        """The model in some words."""

    @abstractmethod
    def summary(self) -> str:
        """Model and data in some words."""

    # -- optimization

    def parameter_groups(self, task: nn.Module) -> list[dict[str, Any]]:
        """Groups for the optimizer; a group's rate is ``learning_rate`` times its ``lr_scale``, if it has one."""
        return parameter_groups(task, self.config.optimizer.weight_decay)

    @abstractmethod
    def epochs(self) -> int:
        """Of the whole schedule."""

    @abstractmethod
    def learning_rate(self, step: int, order: SampleOrder) -> float:
        """Of optimizer step ``step`` (from 0)."""

    # -- evaluation

    evaluates: ClassVar[bool] = False
    """Whether there is an evaluation."""

    def evaluates_after(self, step: int, total: int, order: SampleOrder) -> bool:
        """Whether the model is to be evaluated when ``step`` steps are done."""
        return False

    def evaluate(
        self, task: nn.Module, device: torch.device, beat: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Mapping[str, float] | None:
        """Figures of the model as it is, on all ranks together, which all call this; the task's mode is kept.

        Args:
            beat: told what is about to be done.
            stopped: whether the run was asked to stop; all ranks ask together, and get the same answer.

        Returns:
            None if it was, and the evaluation was given up.

        Raises:
            UserError: if nothing can be evaluated.
        """
        raise NotImplementedError(f"{self.doing} has no evaluation")
