"""Choosing and building the loader of a run."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.order import BEGIN, Place, SampleOrder
from sgmim_fast.data.pair_samples import PairDataset, SampleKey
from sgmim_fast.data.substitution import BadSample, Substitutes
from sgmim_fast.data.torch_loader import TorchLoader
from sgmim_fast.errors import UserError


def build_loader(
    pairs: Pairs,
    config: PretrainConfig,
    *,
    rank: int,
    world_size: int,
    place: Place = BEGIN,
    device: torch.device | None = None,
    tell: Callable[[BadSample], None] = lambda bad: None,
) -> Loader:
    """One rank's micro-batches, endless over the epochs, from ``place`` on; see ``Batch``.

    Args:
        device: of the training, None for the CPU; for a GPU, batches are page-locked, or made there by DALI.
        tell: called with every bad pair and the pair that stood in for it.

    Raises:
        UserError: at once if the data set is smaller than one optimizer step or the loader cannot read it; with the
            batch, from whichever process, once too many files are bad. The message is one line that names the file.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    order = sample_order(pairs, config, world_size)
    substitutes = Substitutes(len(pairs), config.train.seed, config.data.max_bad_share, tell)
    on_gpu = device is not None and device.type == "cuda"
    if choose_loader(pairs, config)[0] == "torch":
        return TorchLoader(
            PairDataset(config),
            partial(SampleKey.of, pairs, config),
            order,
            substitutes,
            workers=config.data.workers,
            rank=rank,
            place=place,
            pin_memory=on_gpu,
        )
    from sgmim_fast.data.dali_loader import DaliLoader

    if config.data.decode_on == "gpu" and not on_gpu:
        raise UserError("--data.decode-on gpu needs a training on a GPU; use cpu or auto")
    device_id = device.index if device is not None and on_gpu and config.data.decode_on != "cpu" else None
    return DaliLoader(pairs, config, order, substitutes, rank=rank, place=place, device_id=device_id, pin_memory=on_gpu)


def sample_order(pairs: Pairs, config: PretrainConfig, world_size: int) -> SampleOrder:
    """The order of a run's samples."""
    return SampleOrder(
        len(pairs),
        batch_size=config.train.batch_size,
        world_size=world_size,
        accumulation_steps=config.train.accumulation_steps,
        seed=config.train.seed,
        shard_sizes=pairs.shard_sizes,
        shuffle_buffer=config.data.shuffle_buffer,
    )


def dali_installed() -> bool:
    """Whether there is a package of NVIDIA DALI, working or not."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def choose_loader(pairs: Pairs, config: PretrainConfig) -> tuple[Literal["torch", "dali"], str]:
    """The loader that ``data.loader`` means for a data set, and why."""
    choice = config.data.loader
    if choice != "auto":
        return choice, "as asked for"
    if not dali_installed():
        return "torch", "NVIDIA DALI is not installed"
    from sgmim_fast.data.dali_decoding import objection

    reason = objection(pairs, config)
    return ("torch", reason) if reason else ("dali", "it can read this data set")
