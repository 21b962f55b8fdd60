"""The pieces of an experiment: which there are, which have a row, and how long those that are left may take."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from benchmarks import rows
from benchmarks.replicating.arms import ARMS, ROW_COLOUR
from benchmarks.replicating.sizes import USUAL, VERSION, Size, Variant
from benchmarks.rows import Row

Stage = Literal["pretrain", "probe", "depth", "segmentation"]
"""The last two are fine-tuning."""
STAGES: tuple[Stage, ...] = get_args(Stage)
BENCHMARK = "replication"


@dataclass(frozen=True)
class Piece:
    """What one row is about, and what is done without a stop."""

    arm: str
    seed: int
    stage: Stage
    labels: int | None = None
    variant: Variant = USUAL

    @property
    def name(self) -> str:
        """For files and people."""
        labels = "" if self.labels is None else f"-{self.labels}"
        return f"{self.arm}-{self.seed}-{self.stage}{labels}{self.variant.name}"

    @property
    def pretraining(self) -> "Piece":
        """The piece that makes the weights this one begins with."""
        return Piece(self.arm, self.seed, "pretrain", None, self.variant)


def variant_of(arm: str, variant: Variant) -> Variant:
    """What of it concerns an arm: nothing, where nothing is pre-trained."""
    return USUAL if arm == ROW_COLOUR or ARMS[arm].kind is None else variant


def piece_of(row: Row) -> Piece:
    """What a row is about."""
    return Piece(row["arm"], row["seed"], row["stage"], row["labels"], Variant(row["rate"], row["length"]))


def pieces_of(size: Size, arms: Sequence[str], seeds: Iterable[int], variant: Variant = USUAL) -> list[Piece]:
    """All pieces, one seed after the other, so that what is there early can be compared already."""
    found = []
    for seed in seeds:
        for arm in (ROW_COLOUR, *arms):
            if arm == ROW_COLOUR:
                found += [Piece(arm, seed, "probe", labels) for labels in size.labels]
                continue
            own = variant_of(arm, variant)
            found.append(Piece(arm, seed, "pretrain", None, own))
            for stage in STAGES[1:]:
                found += [Piece(arm, seed, stage, labels, own) for labels in size.labels]
    return found


def share_of(pieces: Sequence[Piece], number: int, count: int) -> list[Piece]:
    """What process ``number`` of ``count`` does: every N-th arm of a seed, with all that builds on its weights."""
    groups = list(dict.fromkeys((piece.seed, piece.arm) for piece in pieces))
    own = set(groups[number::count])
    return [piece for piece in pieces if (piece.seed, piece.arm) in own]


def fingerprint(size: Size, piece: Piece) -> str:
    """Of all settings that a piece's figures depend on. Settings of later stages do not count for earlier ones."""
    settings = asdict(size)
    later = {
        "pretrain": ("labels", "finetune_", "depth", "segmentation", "layer_decay", "probe_", "test_scenes"),
        "probe": ("labels", "finetune_", "depth_lr", "segmentation_lr", "layer_decay"),
    }.get(piece.stage, ("labels", "probe_"))
    kept = {name: value for name, value in settings.items() if not name.startswith(later)}
    if piece.stage == "probe":
        kept |= {"depth": settings["depth"], "segmentation": settings["segmentation"]}
    for name in ("name", "lr_factors", "lengths", "loading_threads"):
        kept.pop(name)
    if piece.arm == ROW_COLOUR:
        kept = {name: value for name, value in kept.items() if not name.startswith("pretrain")}
    else:
        kept["arm"] = repr(ARMS[piece.arm])
    text = json.dumps([VERSION, kept, asdict(piece)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    """The rows of this benchmark in a file; none where there is no file. A last line that was cut off is none.

    Raises:
        UserError: for another line that is no row.
    """
    return [row for row in rows.read(path) if row["benchmark"] == BENCHMARK]


def done(known: Iterable[Row]) -> dict[str, Row]:
    """Rows by fingerprint."""
    return {row["fingerprint"]: row for row in known}


def estimated_seconds(piece: Piece, known: Iterable[Mapping[str, Any]], size: Size) -> float | None:
    """What a piece may take: the median of its stage's rows of this size, if possible of its arm; None without any."""
    same = [
        row
        for row in known
        if (row["size"], row["stage"], row["length"]) == (size.name, piece.stage, piece.variant.length)
    ]
    if piece.stage == "pretrain":  # that of scratch takes no time
        same = [row for row in same if (row["arm"] == "scratch") == (piece.arm == "scratch")]
    own = [row for row in same if row["arm"] == piece.arm and row["labels"] == piece.labels]
    chosen = own or [row for row in same if row["labels"] == piece.labels] or same
    return median(row["cost"]["seconds"] for row in chosen) if chosen else None
