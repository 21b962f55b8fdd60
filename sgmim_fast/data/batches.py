"""What every loader hands out, and what is drawn for it."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

import torch

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.order import SampleOrder
from sgmim_fast.data.substitution import Substitutes
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, sample_rng

Sample = dict[str, Any]
"""Tensors of one sample, and its dataset ``index``."""

Batch = dict[str, torch.Tensor]
"""float32 ``image`` (B,3,S_h,S_w), normalised, and int64 ``index`` (B,), positions in the data set. Of pre-training
also float32 ``structure`` (B,C,S_h,S_w), raw values, absent with guidance "none"; bool ``mask`` (B,Gh,Gw), True where
the image is masked; int32 ``masked`` (B,K) and ``visible`` (B,Gh*Gw-K), cell indices ascending. Of a dense task float32
``depth`` (B,1,S_h,S_w), metres, 0 where invalid, or int64 ``label`` (B,S_h,S_w), 255 where ignored."""


class Loader(ABC):
    """Endless iterator over one rank's micro-batches; a context manager that ends its threads or processes."""

    def __init__(self, order: SampleOrder, substitutes: Substitutes) -> None:
        self.order, self.substitutes = order, substitutes

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def close(self) -> None:
        """End threads or processes and wait for them."""

    def processes(self) -> list[int]:
        """Ids of the processes that make batches; each writes its stacks to the error stream on SIGUSR1."""
        return []

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def draw_mask(config: PretrainConfig, epoch: int, index: int) -> torch.Tensor:
    """The cell mask of one sample, (Gh, Gw) bool."""
    rng = sample_rng(config.train.seed, epoch, index, STREAM_MASK)
    return torch.from_numpy(draw_cell_mask(rng, config.model.grid, config.data.mask_ratio))
