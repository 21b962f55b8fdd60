"""Doing pieces: weights and figures of single test images in the work folder, a row for each piece."""

import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from benchmarks.replicating.arms import ARMS, ROW_COLOUR
from benchmarks.replicating.locking import locked
from benchmarks.replicating.pieces import BENCHMARK, Piece, Row, done, fingerprint, read_rows
from benchmarks.replicating.scenes import DenseScenes, SceneFolders, render
from benchmarks.replicating.sizes import Size
from benchmarks.replicating.stages import Result, Weights, finetune, pretrain, probe, probe_features
from sgmim_fast.errors import UserError
from sgmim_fast.probing.features import Features

Say = Callable[[str], None]


def images_file(work: Path, size: Size, piece: Piece) -> Path:
    """Where the figures of single test images are, an array a set: (images, 11) of depth, or (images, classes, classes)
    pixels.
    """
    return work / "images" / f"{size.name}-{piece.name}-{fingerprint(size, piece)}.npz"


class Runner:
    """Does the pieces of one size.

    Args:
        size: of the experiment.
        work: folder for scenes, weights and figures of single images.
        output: JSONL file that rows are appended to.
        workers: processes that render; None for one a core.
        say: told what is done.
    """

    def __init__(self, size: Size, work: Path, output: Path, workers: int | None, say: Say) -> None:
        if size.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--size {size.name} needs a CUDA GPU, and none is visible here; choose --size micro")
        self.size, self.work, self.output, self.workers, self.say = size, work, output, workers, say
        self.rows = harness.Rows(output, torch.device(size.device))
        self._folders: SceneFolders | None = None
        self._scenes: DenseScenes | None = None
        self._probed: tuple[Piece, Features] | None = None

    @property
    def folders(self) -> SceneFolders:
        if self._folders is None:
            self._folders = render(self.size, self.work, self.workers, self.say)
        return self._folders

    @property
    def scenes(self) -> DenseScenes:
        if self._scenes is None:
            self._scenes = DenseScenes(self.size, self.folders)
        return self._scenes

    def left(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Those without a row of the same settings, in their order, each after the pre-training it begins with."""
        known = done(read_rows(self.output))
        missing = [piece for piece in pieces if fingerprint(self.size, piece) not in known]
        found: list[Piece] = []
        for piece in missing:
            needed = piece.pretraining
            if piece.arm != ROW_COLOUR and not self.weights_file(needed).is_file() and needed not in found:
                found.append(needed)
            if piece not in found:
                found.append(piece)
        return found

    def run(self, pieces: Sequence[Piece], minutes: float | None) -> int:
        """Do what is left; stop after the piece in which so many minutes are over. Returns how many are left then.

        Raises:
            UserError: if a package is missing, or as ``do``.
        """
        torch.set_num_threads(self.size.threads)
        began = time.monotonic()
        todo = self.left(pieces)
        if any(piece.stage == "segmentation" for piece in todo) and find_spec("segmentation_models_pytorch") is None:
            raise UserError(
                "fine-tuning of classes needs segmentation-models-pytorch, which is not installed; install it, or "
                "leave that out with --stages probe depth"
            )
        for number, piece in enumerate(todo):
            if minutes is not None and time.monotonic() - began >= 60 * minutes:
                return len(todo) - number
            self.do(piece)
        return 0

    def do(self, piece: Piece) -> None:
        """Do a piece, and write its row unless it has one (its weights were lost, then).

        Raises:
            UserError: if a repeated pre-training does not give the figures of its row.
        """
        self.folders, self.scenes  # noqa: B018 - what is rendered and opened once is no piece's cost
        began = time.monotonic()
        result = self._result(piece)
        seconds = time.monotonic() - began
        row = self._row(piece, result, seconds)
        before = done(read_rows(self.output)).get(row["fingerprint"])
        if before is None:
            with locked(self.work / "rows.lock"):
                self.rows.append(row)
        elif before["figures"] != row["figures"] and self.size.device == "cpu":
            raise UserError(
                f"{piece.name} was repeated because its weights are gone, and its figures differ from those of its row "
                f"in {self.output}; use another --output on another kind of machine"
            )
        self.say(f"{piece.name}: {seconds:.1f} s")

    def _row(self, piece: Piece, result: Result, seconds: float) -> Row:
        return {
            "benchmark": BENCHMARK,
            "size": self.size.name,
            "arm": piece.arm,
            "seed": piece.seed,
            "stage": piece.stage,
            "labels": piece.labels,
            "rate": piece.variant.rate,
            "length": piece.variant.length,
            "fingerprint": fingerprint(self.size, piece),
            "device": self.size.device,
            "precision": self.size.precision,
            "threads": self.size.threads,
            "figures": result.figures,
            "cost": {"seconds": round(seconds, 3), **result.cost},
        }

    def _result(self, piece: Piece) -> Result:
        if piece.stage == "pretrain":
            weights, result = pretrain(self.size, ARMS[piece.arm], piece.seed, self.folders, piece.variant)
            self._keep(weights, self.weights_file(piece))
            return result
        assert piece.labels is not None
        if piece.stage == "probe":
            return probe(self.size, self._features(piece), piece.seed, piece.labels, self.scenes)
        weights = self.weights(piece)
        _, result = finetune(piece.stage, self.size, weights, piece.seed, piece.labels, self.scenes)
        path = self.images_file(piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **result.arrays)  # type: ignore[arg-type]
        return result

    def _features(self, piece: Piece) -> Features:
        """Those of one encoder are kept: its probes on other numbers of labels need the same."""
        key = piece.pretraining
        if self._probed is None or self._probed[0] != key:
            weights = None if piece.arm == ROW_COLOUR else self.weights(piece)
            self._probed = key, probe_features(self.size, weights)
        return self._probed[1]

    # -- the work folder

    def weights_file(self, pretraining: Piece) -> Path:
        """Where the weights of a pre-training are."""
        return self.work / "weights" / f"{self.size.name}-{pretraining.name}-{fingerprint(self.size, pretraining)}.pt"

    def images_file(self, piece: Piece) -> Path:
        """See the function of this name."""
        return images_file(self.work, self.size, piece)

    def weights(self, piece: Piece) -> Weights:
        """What the piece begins with.

        Raises:
            UserError: if that has not been made.
        """
        path = self.weights_file(piece.pretraining)
        if not path.is_file():
            raise UserError(f"{path} does not exist; run {piece.pretraining.name} first")
        weights: Weights = torch.load(path, weights_only=True)
        return weights

    def _keep(self, weights: Weights, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        torch.save(weights, temporary)
        os.replace(temporary, path)
