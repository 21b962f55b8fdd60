"""The images that probes are fitted and scored on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from sgmim_fast.config import DepthConfig, DepthDataset, DepthEvalConfig, LabelDataset
from sgmim_fast.data.dense.opening import open_depth, open_labels
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.errors import UserError
from sgmim_fast.finetune_recipes import DEPTH_RECIPES, SEGMENTATION_RECIPES
from sgmim_fast.probing.settings import ProbeSettings
from sgmim_fast.probing.targets import ClassTarget, DepthTarget, Target

Kind = Literal["depth", "segmentation"]
DATASETS = tuple(dict.fromkeys((*get_args(DepthDataset), *get_args(LabelDataset))))


@dataclass(frozen=True)
class ProbeSplits:
    """Images with one kind of target."""

    kind: Kind
    train: DenseSamples
    val: DenseSamples
    target: Target

    def chosen(self, settings: ProbeSettings) -> tuple[list[int], list[int]]:
        """Indices to fit on, in the order they were drawn, and to score on.

        Raises:
            UserError: if there are fewer.
        """
        for option, wanted, samples in (
            ("train", settings.train_images, self.train),
            ("val", settings.val_images, self.val),
        ):
            if wanted > len(samples):
                raise UserError(
                    f"--{option}-images {wanted} is more than there are ({samples.describe()}); ask for {len(samples)} "
                    "or fewer"
                )
        drawn = np.random.default_rng(settings.seed).permutation(len(self.train))[: settings.train_images]
        count, wanted = len(self.val), settings.val_images
        return drawn.tolist(), [number * count // wanted for number in range(wanted)]


def names_sha256(samples: DenseSamples, indices: Sequence[int]) -> str:
    """Fingerprint of which images these are."""
    return hashlib.sha256("\n".join(samples.name(index) for index in indices).encode()).hexdigest()


def kinds_of(dataset: str) -> tuple[Kind, ...]:
    """The kinds of targets that a data set has."""
    found: list[Kind] = []
    if dataset in get_args(DepthDataset):
        found.append("depth")
    if dataset in get_args(LabelDataset):
        found.append("segmentation")
    return tuple(found)


def open_splits(
    kind: Kind,
    dataset: str,
    path: str,
    *,
    lists: tuple[str | None, str | None] = (None, None),
    max_depth: float | None = None,
    depth_scale: float | None = None,
    classes: int | None = None,
) -> ProbeSplits:
    """A data set in the layouts of ``open_depth`` and ``open_labels``. Unless given, limits are those of the recipes of
    fine-tuning, and so is the crop that counts in an image's depth.

    Args:
        lists: of training and of evaluation.
        max_depth: metres.
        depth_scale: stored units a metre, of a folder.
        classes: number of classes, of a folder.

    Raises:
        UserError: if the data set has no such target, and as those.
    """
    if kind not in kinds_of(dataset):
        raise UserError(f"dataset {dataset} has no {'depth maps' if kind == 'depth' else 'labels'}")
    given: dict[str, Any] = {"path": path, "train_list": lists[0], "val_list": lists[1]}
    if kind == "depth":
        recipe = DEPTH_RECIPES[dataset]()
        if depth_scale is not None:
            given["depth_scale"] = depth_scale
        depth: DepthConfig = recipe.depth if max_depth is None else replace(recipe.depth, max_depth=max_depth)
        protocol: DepthEvalConfig = recipe.evaluation
        data = replace(recipe.data, **given)
        train, val = (open_depth(data, split, max_depth=depth.max_depth) for split in ("train", "val"))
        return ProbeSplits(kind, train, val, DepthTarget(depth.min_depth, depth.max_depth, protocol.crop))
    if dataset == "folder" and classes is None:
        raise UserError("--classes is not set; say how many classes the labels have")
    labels = SEGMENTATION_RECIPES[dataset]()
    classes = labels.segmentation.classes if classes is None else replace(labels.segmentation, classes=classes).classes
    pixels = replace(labels.data, **given)
    train, val = (open_labels(pixels, split, classes=classes) for split in ("train", "val"))
    return ProbeSplits(kind, train, val, ClassTarget(classes))
