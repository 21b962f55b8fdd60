"""Opening a split of a data set of depth maps or of label maps, in the layout that people have on disk."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sgmim_fast.config import DepthDataConfig, SegmentationDataConfig
from sgmim_fast.data.dense.depth_maps import DepthReader, Reach
from sgmim_fast.data.dense.folders import (
    LABEL_SUFFIXES,
    Split,
    SplitPairs,
    check_root,
    listed_split,
    own_split,
    read_ade20k_names,
    read_scenes_description,
)
from sgmim_fast.data.dense.label_maps import LabelReader
from sgmim_fast.data.dense.samples import DenseDecoder, DenseSamples
from sgmim_fast.data.dense.split_lists import Places, find_listed
from sgmim_fast.data.manifest import pair_folders
from sgmim_fast.data.pair_list import PairList
from sgmim_fast.errors import UserError

_LEAST_SHARE = 0.01
"""Of the depths of a split, those that must be within the range of the task."""


class _Benchmark(NamedTuple):
    """A public data set whose splits are lists."""

    reader: DepthReader
    lists: dict[Split, tuple[str, ...]]
    """Names that are looked for in the data set's folder where no list is given."""
    places: dict[Split, Places]
    origin: str
    """Where the lists are from, for the message."""


_KITTI_PLACES = Places(
    ("", "raw_data/", "raw/", "input/"),
    ("", "data_depth_annotated/", "data_depth_annotated/train/", "data_depth_annotated/val/", "gt_depth/"),
)
_BENCHMARKS = {
    "kitti": _Benchmark(
        DepthReader("KITTI", 256, reach=Reach("KITTI reaches 5 to 130 m", (5, 130), (2, 45))),
        {
            "train": ("eigen_train_files_with_gt.txt", "kitti_eigen_train_files_with_gt.txt", "train_list.txt"),
            "val": ("eigen_test_files_with_gt.txt", "kitti_eigen_test_files_with_gt.txt", "test_list.txt"),
        },
        {"train": _KITTI_PLACES, "val": _KITTI_PLACES},
        "the Eigen split of BTS (train_test_inputs/) or MIM-Depth-Estimation (dataset/filenames/eigen_benchmark/)",
    ),
    "nyu": _Benchmark(
        DepthReader("NYU-v2", 1000, reach=Reach("NYU-v2 reaches 2.7 to 15 m", (2.7, 15), (1.5, 9))),
        {
            "train": ("nyudepthv2_train_files_with_gt.txt", "train_list.txt"),
            "val": ("nyudepthv2_test_files_with_gt.txt", "test_list.txt"),
        },
        {
            "train": Places(("", "sync/"), ("", "sync/")),
            "val": Places(("", "official_splits/test/"), ("", "official_splits/test/")),
        },
        "the split of BTS (train_test_inputs/) or MIM-Depth-Estimation (dataset/filenames/nyudepthv2/)",
    ),
}


def open_depth(config: DepthDataConfig, split: Split, *, max_depth: float) -> DenseSamples:
    """The images and depth maps of a split. All listed files must exist, and some maps are looked at for their unit.

    Layouts below ``config.path``; the places are tried in this order for every file:

    * kitti: images in the folder itself, raw_data/, raw/ or input/; maps in the folder itself, data_depth_annotated/,
      its train/ and val/, or gt_depth/; 16-bit PNG, metres = value / 256. Lines without ground truth ("None") are
      left out.
    * nyu: images and maps of training in the folder itself or sync/, of evaluation in the folder itself or
      official_splits/test/; 16-bit PNG, metres = value / 1000.
    * scenes: what `sgmim synth` writes; the last tenth by name is for evaluation.
    * folder: images/ and depth/ with subfolders train and val, or the last tenth by name for evaluation; 16-bit
      PNG, TIFF, or NPY, metres = value / depth_scale.

    Args:
        max_depth: largest depth of the task, metres; tells whether depth_scale makes sense.

    Raises:
        UserError: for anything missing, malformed or in the wrong unit; one line that names the file, and its line.
    """
    if config.dataset in _BENCHMARKS:
        root, found, reader = _open_benchmark(config, split)
    else:
        root = check_root(config.path, "images/ and the depth maps")
        lists = config.train_list, config.val_list
        if config.dataset == "scenes":
            near = read_scenes_description(root)["near"]
            found = own_split(root, split, lists, "images", "structure")
            reader = DepthReader("a folder of scenes", None, near)
        else:
            found = own_split(root, split, lists, "images", "depth")
            expected = (
                f"half of all depths should be nearer than the task's largest, {max_depth:g} m, and some far from 0"
            )
            remedy = "correct --data.depth-scale, or convert the maps"
            reach = Reach(expected, (max_depth / 50, float("inf")), (max_depth / 500, max_depth), remedy)
            reader = DepthReader("the folder", config.depth_scale, integers=False, reach=reach)
    samples = DenseSamples(
        root,
        found.pairs,
        DenseDecoder(reader, config.dataset == "kitti"),
        summary=f"{config.dataset} ({split}): {len(found.pairs)} images of {root}, {found.chosen}",
        max_depth=max_depth,
    )
    where, maps = f"{root} ({split})", [decoded.target for decoded in samples.look()]
    reader.check_unit(where, maps)
    _check_range(where, maps, max_depth)
    return samples


def _check_range(where: str, maps: list[np.ndarray], max_depth: float) -> None:
    """Refuse a largest depth that leaves next to nothing of the maps, which have some depth, to learn or to score."""
    known = np.concatenate([metres[metres > 0] for metres in maps])
    share = float((known < max_depth).mean())
    if share < _LEAST_SHARE:
        raise UserError(
            f"{where}: {share:.1%} of the depths that were looked at are nearer than depth.max_depth {max_depth:g} m, "
            f"and half of them farther than {np.median(known):.4g} m; raise --depth.max-depth, or convert the maps"
        )


def _open_benchmark(config: DepthDataConfig, split: Split) -> tuple[Path, SplitPairs, DepthReader]:
    layout = _BENCHMARKS[config.dataset]
    root = check_root(config.path, f"the images and depth maps of {layout.reader.name}")
    given = config.train_list if split == "train" else config.val_list
    names = layout.lists[split]
    source = Path(given) if given else next((root / name for name in names if (root / name).is_file()), None)
    if source is None:
        raise UserError(
            f"--data.{split}-list is not set, and {root} holds none of {', '.join(names)}; give the list, of "
            f"{layout.origin}"
        )
    found = find_listed(source, root, layout.places[split], rooted=True)
    skipped = f"; {found.without_target} listed without ground truth left out" if found.without_target else ""
    return root, SplitPairs(found.pairs, f"listed in {source}{skipped}"), layout.reader


def open_labels(config: SegmentationDataConfig, split: Split, *, classes: int) -> DenseSamples:
    """The images and label maps of a split. All files must exist, and some are looked at.

    Layouts below ``config.path``; lists, where given, take the place of the data set's own split:

    * ade20k: images/training, images/validation, annotations/training, annotations/validation of ADEChallengeData2016,
      and its objectInfo150.txt for the names of classes, if it is there.
    * scenes: what `sgmim synth` writes; the last tenth by name is for evaluation.
    * folder: images/ and labels/ with subfolders train and val, or the last tenth by name for evaluation; 8-bit PNG.

    Args:
        classes: of the task, 1 to 255.

    Raises:
        UserError: for anything missing or malformed, and labels that no class has; one line that names the file.
    """
    root = check_root(config.path, "images/ and the label maps")
    lists = config.train_list, config.val_list
    names = None
    if config.dataset == "ade20k":
        found = listed_split(root, split, lists) or _ade20k_split(root, split)
        names = read_ade20k_names(root, classes)
    elif config.dataset == "scenes":
        names = read_scenes_description(root)["labels"]
        if len(names) != classes:
            raise UserError(
                f"{root} has {len(names)} classes ({', '.join(names)}), not the {classes} of the task; "
                f"set --segmentation.classes {len(names)}"
            )
        found = own_split(root, split, lists, "images", "labels")
    else:
        found = own_split(root, split, lists, "images", "labels")
    reader = LabelReader(classes, config.first_label, config.ignore_index)
    samples = DenseSamples(
        root,
        found.pairs,
        DenseDecoder(reader, False),
        summary=f"{config.dataset} ({split}): {len(found.pairs)} images of {root}, {found.chosen}",
        class_names=names,
        fit=config.resize,
    )
    samples.look()
    return samples


def _ade20k_split(root: Path, split: Split) -> SplitPairs:
    folder = "training" if split == "train" else "validation"
    for kind in ("images", "annotations"):
        if not (root / kind / folder).is_dir():
            raise UserError(
                f"{root} has no {kind}/{folder}/ folder; give the folder ADEChallengeData2016, which holds images/ and "
                "annotations/ with training/ and validation/ in each"
            )
    entries = pair_folders(root, f"images/{folder}", f"annotations/{folder}", LABEL_SUFFIXES)
    return SplitPairs(PairList(sorted(entries)), f"images/{folder}")
