"""Samples of pre-training: an image and its map, cropped alike, with a cell mask.

Shapes: B pairs a micro-batch, S_h x S_w image pixels, C structure channels, Gh x Gw mask cells of which
K are masked.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data import augment, reading
from sgmim_fast.data.batches import Batch, Sample, draw_mask
from sgmim_fast.data.decoding import check_sizes
from sgmim_fast.data.members import Member, Pairs
from sgmim_fast.masking import STREAM_CROP, mask_indices, sample_rng


class SampleKey(NamedTuple):
    """What a worker needs to make one sample; it travels with the request, so no worker copies the list of pairs."""

    epoch: int
    sample: int
    image: Member
    structure: Member | None

    @classmethod
    def of(cls, pairs: Pairs, config: PretrainConfig, epoch: int, index: int) -> Self:
        image, structure = pairs.members(index)
        if config.model.guidance == "none":
            return cls(epoch, index, image, None)
        if structure is None:
            raise ValueError("the data set was opened without structure maps, but the model's guidance needs them")
        return cls(epoch, index, image, structure)


class PairDataset(Dataset[Sample]):
    """Makes one sample from its key: ``image`` (3,S_h,S_w), ``structure`` (C,S_h,S_w), ``mask`` (Gh,Gw), ``index``.

    The crop and the mask are drawn from (seed, epoch, dataset index), nothing else.

    Args:
        random_crop: False takes the whole image instead: short side to size, centre crop, no flip.
    """

    def __init__(self, config: PretrainConfig, *, random_crop: bool = True) -> None:
        self.config = config
        self.random_crop = random_crop

    def __getitem__(self, key: SampleKey) -> Sample:
        model, data, seed = self.config.model, self.config.data, self.config.train.seed
        file = key.image.read()
        pixels = np.asarray(reading.read_image(file))
        height, width = pixels.shape[:2]
        structure = None
        if key.structure is not None:
            map_file = key.structure.read()
            structure = reading.read_structure(map_file, model.structure_channels)
            check_sizes(file, map_file, (height, width), structure.shape[1:])
        if self.random_crop:
            rng = sample_rng(seed, key.epoch, key.sample, STREAM_CROP)
            augmentation = augment.draw_augmentation(rng, height, width, data)
        else:
            augmentation = augment.central_augmentation(height, width, model.hw)
        # Copied: the crop is then in one piece, and what was decoded can go.
        box = torch.from_numpy(augment.crop(pixels, augmentation).copy())
        sample: Sample = {
            "image": augment.finish_image(box, augmentation.flip, model.hw),
            "mask": draw_mask(self.config, key.epoch, key.sample),
            "index": key.sample,
        }
        if structure is not None:
            box = torch.from_numpy(augment.crop(structure.transpose(1, 2, 0), augmentation).transpose(2, 0, 1))
            sample["structure"] = augment.finish_structure(box, augmentation.flip, model.hw)
        return sample

    def collated(self, samples: Sequence[Sample]) -> Batch:
        """Each tensor gains a leading B; ``masked`` (B,K) and ``visible`` (B,Gh*Gw-K) int32 are added."""
        batch: Batch = default_collate(list(samples))
        batch["masked"], batch["visible"] = mask_indices(batch["mask"])
        return batch


def evaluation_batch(pairs: Pairs, config: PretrainConfig, indices: Sequence[int]) -> Batch:
    """Chosen samples to look at: whole images (short side to size, centre crop), masks of epoch 0."""
    samples = PairDataset(config, random_crop=False)
    return samples.collated([samples[SampleKey.of(pairs, config, 0, index)] for index in indices])
