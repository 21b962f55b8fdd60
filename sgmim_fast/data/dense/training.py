"""Training samples of dense tasks, and the loader that batches them.

A batch of B samples has ``image`` (B,3,h,w) float32, normalised; ``depth`` (B,1,h,w) float32, metres, 0 where invalid,
or ``label`` (B,h,w) int64, 255 where ignored; ``index`` (B,) int64.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from sgmim_fast.config import IGNORED_LABEL, DepthDataConfig, SegmentationDataConfig
from sgmim_fast.data.batches import Batch, Loader, Sample
from sgmim_fast.data.dense import colors, crops
from sgmim_fast.data.dense.samples import DenseDecoder, DenseSamples
from sgmim_fast.data.members import Member
from sgmim_fast.data.order import BEGIN, Place, SampleOrder
from sgmim_fast.data.substitution import BadSample, Substitutes
from sgmim_fast.data.torch_loader import TorchLoader
from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_COLOR, STREAM_CROP, STREAM_CUTDEPTH, sample_rng


class DenseKey(NamedTuple):
    """What a worker needs to make one sample."""

    epoch: int
    sample: int
    image: Member
    target: Member


class DepthTraining(Dataset[Sample]):
    """Makes one sample with depth: ``image`` (3,h,w), ``depth`` (1,h,w), ``index``.

    All that is random is drawn from (seed, epoch, dataset index). Whether a sample gets CutDepth is drawn, too: the
    recipe's every fourth call of a worker would depend on the number of workers and on where a run was resumed.

    Args:
        max_depth: of the task, metres; white in CutDepth's strip.
    """

    def __init__(self, config: DepthDataConfig, decoder: DenseDecoder, *, seed: int, max_depth: float) -> None:
        self.config, self.decoder, self.seed, self.max_depth = config, decoder, seed, max_depth

    def __getitem__(self, key: DenseKey) -> Sample:
        config = self.config
        pixels, metres, _ = self.decoder.decode(key.image, key.target)
        if not metres.any():
            raise UserError(f"{key.target.name}: holds no valid depth, from which nothing is learnt; remove the pair")
        rng = sample_rng(self.seed, key.epoch, key.sample, STREAM_CUTDEPTH)
        if rng.random() < config.cutdepth:
            pixels = crops.cut_depth(pixels, metres, rng, self.max_depth, config.cutdepth_width)
        rng = sample_rng(self.seed, key.epoch, key.sample, STREAM_CROP)
        flip = config.flip and bool(rng.random() < 0.5)
        crop = crops.draw_crop(rng, metres.shape[0], metres.shape[1], config.crop)
        rng = sample_rng(self.seed, key.epoch, key.sample, STREAM_COLOR)
        changed = colors.change_depth_colors(np.ascontiguousarray(pixels[crop]), rng, config)
        image, depth = crops.finish(changed, metres[crop], flip, config.crop, 0)
        return {"image": image, "depth": depth[None], "index": key.sample}

    def collated(self, samples: Sequence[Sample]) -> Batch:
        """Each tensor gains a leading B."""
        batch: Batch = default_collate(list(samples))
        return batch


class LabelTraining(Dataset[Sample]):
    """Makes one sample with labels: ``image`` (3,h,w), ``label`` (h,w) int64, ``index``.

    All that is random is drawn from (seed, epoch, dataset index).
    """

    def __init__(self, config: SegmentationDataConfig, decoder: DenseDecoder, *, seed: int) -> None:
        self.config, self.decoder, self.seed = config, decoder, seed

    def __getitem__(self, key: DenseKey) -> Sample:
        config = self.config
        pixels, labels, _ = self.decoder.decode(key.image, key.target)
        rng = sample_rng(self.seed, key.epoch, key.sample, STREAM_CROP)
        size, crop, flip = crops.draw_resized_crop(rng, labels, config)
        pixels, labels = crops.resized_pixels(pixels, size, crop), crops.resized_labels(labels, size, crop)
        if config.photometric:
            pixels = colors.distort_photometrically(pixels, sample_rng(self.seed, key.epoch, key.sample, STREAM_COLOR))
        image, label = crops.finish(pixels, labels, flip, config.crop_size, IGNORED_LABEL)
        return {"image": image, "label": label.long(), "index": key.sample}

    def collated(self, samples: Sequence[Sample]) -> Batch:
        """Each tensor gains a leading B."""
        batch: Batch = default_collate(list(samples))
        return batch


def dense_order(
    samples: DenseSamples, *, batch_size: int, accumulation_steps: int, world_size: int, seed: int
) -> SampleOrder:
    """The order of a run's samples.

    Raises:
        UserError: if there are fewer samples than one optimizer step takes.
    """
    return SampleOrder(
        len(samples),
        batch_size=batch_size,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        seed=seed,
    )


def build_dense_loader(
    samples: DenseSamples,
    config: DepthDataConfig | SegmentationDataConfig,
    order: SampleOrder,
    *,
    rank: int,
    place: Place = BEGIN,
    device: torch.device | None = None,
    tell: Callable[[BadSample], None] = lambda bad: None,
) -> Loader:
    """One rank's micro-batches, endless over the epochs, from ``place`` on.

    Args:
        order: of ``dense_order``; its seed is that of augmentation, too.
        device: of the training, None for the CPU; for a GPU, batches are page-locked.
        tell: called with every bad sample and the one that stood in for it.

    Raises:
        UserError: with the batch, from whichever process, once too many files are bad; one line that names the file.
    """
    if not 0 <= rank < order.world_size:
        raise ValueError(f"rank {rank} of {order.world_size}")
    made: DepthTraining | LabelTraining
    if isinstance(config, DepthDataConfig):
        if samples.max_depth is None:
            raise ValueError("these samples are not of open_depth")
        made = DepthTraining(config, samples.decoder, seed=order.seed, max_depth=samples.max_depth)
    else:
        made = LabelTraining(config, samples.decoder, seed=order.seed)
    remedy = "mend them, or leave them out of the list"
    return TorchLoader(
        made,
        lambda epoch, index: DenseKey(epoch, index, *samples.members(index)),
        order,
        Substitutes(len(samples), order.seed, config.max_bad_share, tell, remedy),
        workers=config.workers,
        rank=rank,
        place=place,
        pin_memory=device is not None and device.type == "cuda",
    )
