"""The images that probes are fitted and scored on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from sgmim_fast.config import DepthConfig, DepthDataset, DepthEvalConfig, LabelDataset
from sgmim_fast.data.dense.folders import Split
from sgmim_fast.data.dense.opening import open_depth, open_labels
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.data.pair_list import PairList
from sgmim_fast.errors import UserError
from sgmim_fast.finetune_recipes import DEPTH_RECIPES, SEGMENTATION_RECIPES
from sgmim_fast.probing.settings import ProbeSettings
from sgmim_fast.probing.targets import ClassTarget, DepthTarget, Target

Kind = Literal["depth", "segmentation"]
DATASETS = tuple(dict.fromkeys((*get_args(DepthDataset), *get_args(LabelDataset))))
_FOLDERS = ("scenes", "folder")
"""Data sets of which a folder may be scored on as a whole."""
_Opener = Callable[[str, Split], DenseSamples]


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
    val_path: str | None = None,
    lists: tuple[str | None, str | None] = (None, None),
    max_depth: float | None = None,
    depth_scale: float | None = None,
    classes: int | None = None,
) -> ProbeSplits:
    """A data set in the layouts of ``open_depth`` and ``open_labels``. Unless given, limits are those of the recipes of
    fine-tuning, and so is the crop that counts in an image's depth.

    Args:
        val_path: another folder of the same layout, scenes or folder; all of its images are those to score on.
        lists: of training and of evaluation.
        max_depth: metres.
        depth_scale: stored units a metre, of a folder.
        classes: number of classes, of a folder.

    Raises:
        UserError: if the data set has no such target, and as those.
    """
    if kind not in kinds_of(dataset):
        raise UserError(f"dataset {dataset} has no {'depth maps' if kind == 'depth' else 'labels'}")
    if val_path is not None and (dataset not in _FOLDERS or lists != (None, None)):
        raise UserError("--val-data is for --dataset scenes or folder without lists; leave it or the lists out")
    given = {"path": path, "train_list": lists[0], "val_list": lists[1]}
    if kind == "depth":
        open_split, target = _depth(dataset, given, max_depth, depth_scale)
    else:
        open_split, target = _labels(dataset, given, classes)
    train = open_split(path, "train")
    val = open_split(path, "val") if val_path is None else _whole(open_split, dataset, val_path)
    return ProbeSplits(kind, train, val, target)


def _depth(
    dataset: str, given: dict[str, Any], max_depth: float | None, depth_scale: float | None
) -> tuple[_Opener, Target]:
    recipe = DEPTH_RECIPES[dataset]()
    depth: DepthConfig = recipe.depth if max_depth is None else replace(recipe.depth, max_depth=max_depth)
    protocol: DepthEvalConfig = recipe.evaluation
    data = replace(recipe.data, **given | ({} if depth_scale is None else {"depth_scale": depth_scale}))
    return (
        lambda path, split: open_depth(replace(data, path=path), split, max_depth=depth.max_depth),
        DepthTarget(depth.min_depth, depth.max_depth, protocol.crop),
    )


def _labels(dataset: str, given: dict[str, Any], classes: int | None) -> tuple[_Opener, Target]:
    if dataset == "folder" and classes is None:
        raise UserError("--classes is not set; say how many classes the labels have")
    recipe = SEGMENTATION_RECIPES[dataset]()
    count = recipe.segmentation.classes
    if classes is not None:
        count = replace(recipe.segmentation, classes=classes).classes
    data = replace(recipe.data, **given)
    return lambda path, split: open_labels(replace(data, path=path), split, classes=count), ClassTarget(count)


def _whole(open_split: _Opener, dataset: str, path: str) -> DenseSamples:
    """Both splits of a folder as one."""
    train, val = open_split(path, "train"), open_split(path, "val")
    pairs = PairList.of(sorted([*train.pairs, *val.pairs]))
    return DenseSamples(
        train.root,
        pairs,
        train.decoder,
        summary=f"{dataset}: all {len(pairs)} images of {train.root}",
        class_names=train.class_names,
        max_depth=train.max_depth,
        fit=train.fit,
    )
