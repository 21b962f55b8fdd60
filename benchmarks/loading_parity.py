"""Whether two loaders give the same batches: what is asked before they are timed."""

from itertools import islice

import torch

from benchmarks.loading_contender import Job
from benchmarks.loading_pairs import open_part
from sgmim_fast.data.batches import Batch
from sgmim_fast.data.loading import build_loader
from sgmim_fast.errors import UserError

COMPARED = 2  # batches
DRAWN = ("index", "mask", "masked", "visible")  # equal to the bit, whoever decodes
SMALLEST_STD = 0.225  # of the normalisation: a level of any channel is at least a level here
# Resizing to 8 bits rounds, and decoders of JPEG differ by a level or two; maps are resized in float32.
MOST = {"image_levels_mean": 0.25, "image_levels_max": 4.0, "map_share_max": 3e-5}


def compare_loaders(ours: Job, theirs: Job) -> dict[str, float]:
    """How far their first batches are apart: images in 8-bit levels, maps as a share of their largest value.

    Raises:
        UserError: if they are further apart than rounding explains.
    """
    found = {"batches": COMPARED} | dict.fromkeys(MOST, 0.0)
    for mine, other in zip(first_batches(ours), first_batches(theirs), strict=True):
        if unequal := [name for name in DRAWN if not torch.equal(mine[name], other[name])]:
            raise disagreement(ours, f"their {unequal[0]} differs")
        levels = (mine["image"] - other["image"]).abs() * 255 * SMALLEST_STD
        largest = other["structure"].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        depths = (mine["structure"] - other["structure"]).abs() / largest
        errors = (levels.mean(), levels.max(), depths.max())
        for (name, most), error in zip(MOST.items(), map(torch.Tensor.item, errors), strict=True):
            if not error <= most:  # so that NaN is too much
                raise disagreement(ours, f"{name} is {error:.2g}, more than {most:g}")
            found[name] = max(found[name], error)
    return found


def first_batches(job: Job) -> list[Batch]:
    pairs = open_part(job.path, job.pairs)
    with build_loader(pairs, job.config, rank=0, world_size=1, device=torch.device(job.device)) as loader:
        return [{name: values.cpu() for name, values in batch.items()} for batch in islice(loader, COMPARED)]


def disagreement(job: Job, how: str) -> UserError:
    return UserError(
        f"{job.path}: the loaders give different batches ({how}), so nothing was timed; "
        "tests/test_loaders.py tells more"
    )
