"""The rendered scenes of an experiment: for pre-training, and with their depth and labels for tasks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.replicating.locking import locked
from benchmarks.replicating.sizes import Size
from sgmim_fast.config import DepthDataConfig, SegmentationDataConfig
from sgmim_fast.data.dense.folders import Split
from sgmim_fast.data.dense.opening import open_depth, open_labels
from sgmim_fast.data.dense.samples import Decoded, DenseDecoder, DenseSamples, TargetReader
from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.members import Member, Pairs
from sgmim_fast.data.pair_list import PairList
from sgmim_fast.data.scenes.splits import SceneSplit
from sgmim_fast.data.scenes.synthetic import render_dataset
from sgmim_fast.probing.data import Kind

_LISTED = ("images", "structure", "labels", "normals")


TEST, FAMILIAR = "test", "familiar"
"""Sets to test on: textures, furniture and cameras that training never shows; and new scenes of the kind it shows."""


@dataclass(frozen=True)
class SceneFolders:
    """Where they are: ``train`` and the two sets to test on as rendered; ``dense`` names them as one data set."""

    train: Path
    test: Path
    familiar: Path
    dense: Path


def render(size: Size, work: Path, workers: int | None, say: Callable[[str], None]) -> SceneFolders:
    """Render what is not there yet."""
    root = work / f"scenes-{size.name}"
    with locked(root / ".lock"):
        return _rendered(size, root, workers, say)


def _rendered(size: Size, root: Path, workers: int | None, say: Callable[[str], None]) -> SceneFolders:
    folders = SceneFolders(*(root / name for name in ("train", TEST, FAMILIAR, "dense")))
    side = max(size.model.hw)
    say(f"scenes in {root}")
    seed, count = size.scene_seed, size.test_scenes
    splits: tuple[tuple[Path, int, int, SceneSplit], ...] = (
        (folders.train, size.scenes, seed, "train"),
        (folders.test, count, seed, "test"),
        (folders.familiar, count, seed + 1, "train"),
    )
    for folder, scenes, own_seed, split in splits:
        render_dataset(folder, count=scenes, size=side, seed=own_seed, workers=workers, normals=True, split=split)
    for kind in _LISTED:
        _link(folders.dense / kind / "train", folders.train / kind)
        for folder in (folders.test, folders.familiar):
            _link(folders.dense / kind / "val" / folder.name, folder / kind)
    for name in ("dataset.json", "metadata.jsonl"):  # the scale, and the sign that rendering came to its end
        (folders.dense / name).write_bytes((folders.train / name).read_bytes())
    return folders


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def set_of(name: str) -> str:
    """``TEST`` or ``FAMILIAR``, by the name of a sample."""
    return name.split("/")[-2]


def open_maps(folders: SceneFolders, maps: str) -> Pairs:
    """Pairs for pre-training, in the order of their names whatever the maps."""
    if maps == "structure":
        return read_manifest(folders.train)
    listed = folders.train.parent / f"{maps}.txt"
    names = sorted(path.stem for path in (folders.train / "images").iterdir())
    root = folders.train.resolve()
    listed.write_text("".join(f"{root}/images/{name}.jpg {root}/{maps}/{name}.png\n" for name in names))
    return read_manifest(listed)


class KeptDecoder(DenseDecoder):
    """Keeps what it has decoded: the scenes of an experiment fit into memory."""

    def __new__(cls, reader: TargetReader, benchmark_crop: bool) -> "KeptDecoder":
        made = super().__new__(cls, reader, benchmark_crop)
        made._kept = {}
        return made

    _kept: dict[str, Decoded]

    def decode(self, image: Member, target: Member) -> Decoded:
        found = self._kept.get(image.path)
        if found is None:
            found = self._kept[image.path] = super().decode(image, target)
        return found


class DenseScenes:
    """The labelled scenes, opened and decoded once."""

    def __init__(self, size: Size, folders: SceneFolders) -> None:
        self.size = size
        side = size.model.hw
        path = str(folders.dense)
        self.depth = DepthDataConfig(dataset="scenes", path=path, crop_size=side, workers=0)
        self.labels = SegmentationDataConfig(
            dataset="scenes", path=path, crop_size=side, resize=None, ratio_range=(0.8, 1.5), workers=0
        )
        self._open: dict[tuple[Kind, Split], DenseSamples] = {}

    def split(self, kind: Kind, split: Split) -> DenseSamples:
        """All scenes of "train", or those of both sets to test on ("val")."""
        if (kind, split) not in self._open:
            if kind == "depth":
                samples = open_depth(self.depth, split, max_depth=self.size.depth.max_depth)
            else:
                samples = open_labels(self.labels, split, classes=self.size.segmentation.classes)
            samples.decoder = KeptDecoder(*samples.decoder)
            self._open[kind, split] = samples
        return self._open[kind, split]

    def labelled(self, kind: Kind, count: int, seed: int) -> DenseSamples:
        """``count`` training scenes, drawn by the seed; a larger number adds to those of a smaller one."""
        all_of_them = self.split(kind, "train")
        drawn = np.random.default_rng(seed).permutation(len(all_of_them))[:count].tolist()
        return DenseSamples(
            all_of_them.root,
            PairList.of([all_of_them.pairs[index] for index in drawn]),
            all_of_them.decoder,
            summary=f"{count} of {all_of_them.describe()}",
            class_names=all_of_them.class_names,
            max_depth=all_of_them.max_depth,
        )
