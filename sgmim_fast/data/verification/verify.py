"""``sgmim verify``: decode every pair once, as training would, and list the good ones and the bad ones.

    DIR/manifest.tsv        the good pairs; training reads it (``read_manifest``)
    DIR/quarantine.jsonl    the bad ones, and why
    DIR/.manifest.tsv.part  results so far, while it runs or after it was interrupted

For a list file the names are LIST.manifest.tsv and LIST.quarantine.jsonl, beside it.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgmim_fast import __version__
from sgmim_fast.data.manifest import find_source, list_pairs, root_of
from sgmim_fast.data.pair_list import PairList
from sgmim_fast.data.shards import SHARD_LIST
from sgmim_fast.data.verification.checks import CheckSettings, Item, MakeDecoder, create_decoder, decoder_version
from sgmim_fast.data.verification.journal import Journal
from sgmim_fast.data.verification.pool import CHUNK, check_pairs
from sgmim_fast.data.verification.results import Results
from sgmim_fast.data.verified import (
    Verification,
    manifest_path,
    quarantine_path,
    refuse_foreign,
    write_quarantine,
    write_verified,
)
from sgmim_fast.errors import UserError

MIN_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a verification found."""

    total: int
    """Pairs in the listing."""
    good: int
    quarantined: dict[str, int]
    """Pairs left out, by kind of reason."""
    remarks: dict[str, int]
    """Images with peculiarities that are no reason to leave them out."""
    value_type: str
    """Of the good pairs' maps."""
    decoded: int
    """Pairs checked now; the others were known from an interrupted verification."""
    seconds: float
    """That checking them took."""
    manifest: Path
    quarantine: Path

    @property
    def exit_code(self) -> int:
        """0: all pairs are good; 1: some are not; 3: none is."""
        if not self.good:
            return 3
        return 1 if self.quarantined else 0

    def lines(self) -> list[str]:
        """For people."""
        maps = f", {self.value_type} maps" if self.value_type else ""
        rate = f", {self.decoded / self.seconds:.0f} a second" if self.decoded else ""
        lines = [f"{self.good} of {self.total} pairs are good{maps} ({self.decoded} decoded now{rate})"]
        lines += [f"  {count} left out: {kind}" for kind, count in self.quarantined.items()]
        lines += [f"  {count} kept, to know: {remark}" for remark, count in self.remarks.items()]
        lines.append(f"manifest: {self.manifest}")
        if self.quarantined:
            lines.append(f"left out, and why: {self.quarantine}")
        return lines


def verify(
    path: str | os.PathLike[str],
    *,
    structure: bool = True,
    channels: int = 1,
    loader: str = "torch",
    workers: int | None = None,
    min_side: int = MIN_SIDE,
    keep_duplicates: bool = False,
    progress: Callable[[int, int], None] | None = None,
    make_decoder: MakeDecoder = create_decoder,
) -> Summary:
    """Check every pair of a folder or list file and write its manifest and quarantine list.

    The same call again after an interruption goes on where it was.

    Args:
        structure: False looks at the images only; the manifest then serves guidance "none" only.
        channels: of the maps.
        loader: "torch" or "dali", whose decoder is used.
        workers: processes; None for one a core.
        min_side: pixels that each side of an image must have.
        keep_duplicates: keep images with the same bytes as an earlier one.
        progress: called in this process with (pairs done, pairs).
        make_decoder: of (loader, channels), imported by name in each process.

    Raises:
        UserError: if there is nothing to verify, an option makes no sense, or a process is ended from outside.
    """
    for option, value in (("--workers", workers), ("--channels", channels), ("--min-side", min_side)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be 1 or more")
    if (Path(path) / SHARD_LIST).is_file():
        raise UserError(f"{path} is a sharded data set; verify the folder before packing it")
    source = find_source(path)
    manifest = manifest_path(source)
    refuse_foreign(manifest)
    settings = CheckSettings(
        structure=structure, channels=channels, loader=loader, decoder=decoder_version(loader), min_side=min_side
    )
    results = Results(list_pairs(source, structure, lambda _: True))
    journal = Journal(manifest.with_name(f".{manifest.name}.part"), settings)
    with closing(journal):
        for index, checked in journal.results(results.pairs, root_of(source)):
            results.put(index, checked)
        decoded, seconds = _check_rest(results, root_of(source), settings, journal, make_decoder, workers, progress)
        value_type = results.refuse_minority_types()
        if not keep_duplicates:
            results.refuse_duplicates()
        write_quarantine(
            quarantine_path(source), ((results.pairs[index], kind, why) for index, kind, why in results.refused())
        )
        header = _write_manifest(manifest, results, settings, value_type)
        journal.close(delete=True)
    return Summary(
        total=len(results.pairs),
        good=header.good,
        quarantined=header.quarantined,
        remarks=dict(results.remarks.most_common()),
        value_type=value_type,
        decoded=decoded,
        seconds=seconds,
        manifest=manifest,
        quarantine=quarantine_path(source),
    )


def _check_rest(
    results: Results,
    root: Path,
    settings: CheckSettings,
    journal: Journal,
    make_decoder: MakeDecoder,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, float]:
    """Check the pairs without a result. Returns their number and the seconds it took."""
    todo = results.unknown()
    total = len(results.pairs)
    done = total - len(todo)
    report = progress or (lambda done, total: None)
    report(done, total)
    processes = min(workers or len(os.sched_getaffinity(0)), -(-len(todo) // CHUNK))
    began = time.perf_counter()
    with closing(check_pairs(_items(results.pairs, root, todo), settings, make_decoder, processes)) as found:
        for task, checked in found:
            answers = [(item[0], result) for item, result in zip(task, checked, strict=True)]
            journal.add(results.pairs, answers)
            for index, result in answers:
                results.put(index, result)
            done += len(answers)
            report(done, total)
    return len(todo), time.perf_counter() - began


def _items(pairs: PairList, root: Path, places: np.ndarray) -> Iterator[Item]:
    for index in map(int, places):
        image, structure = pairs[index]
        yield index, os.path.join(root, image), None if structure is None else os.path.join(root, structure)


def _write_manifest(path: Path, results: Results, settings: CheckSettings, value_type: str) -> Verification:
    pairs, good = results.pairs, results.good().tolist()
    header = Verification(
        sgmim_version=__version__,
        sha256=PairList([pairs.entry(index) for index in good]).sha256,
        listing_sha256=pairs.sha256,
        images_sha256=pairs.images_only().sha256,
        structure=settings.structure,
        channels=settings.channels,
        loader=settings.loader,
        decoder=settings.decoder,
        value_type=value_type,
        good=len(good),
        quarantined=results.kinds(),
    )
    write_verified(
        path,
        header,
        ((pairs[index], results.numbers(index)) for index in good),
        (pairs[index] for index, _, _ in results.refused()),
    )
    return header
