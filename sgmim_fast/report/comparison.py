"""Two runs side by side: whether they can be compared, what they share, and what each came to."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgmim_fast.errors import UserError
from sgmim_fast.probing.record import ProbeRecord, read_record
from sgmim_fast.report.run import Run, read_run

PROBE = "probe.json"
"""In a run's folder: what ``sgmim probe RUN --output`` wrote about it."""
BASELINES = {"row-colour": "probe-row-colour.json", "random": "probe-random.json"}
"""The same of what needs no pre-training, in the folder of either run."""
_SECTIONS = ("model", "data", "optimizer", "schedule", "train")
_WITHIN_REASON = {
    "model.image_size": "pictures",
    "model.normalize_target_window": "targets",
    "data.mask_ratio": "masks",
    "data.path": "data",
}
"""Settings without which there is nothing to compare, and what they are about."""
_GUIDANCE = {"model.guidance", "model.structure_channels", "model.structure_loss_weight"}
_NO_PART_OF_BATCHES = {"data.workers", "data.max_bad_share"}


@dataclass(frozen=True)
class Comparison:
    """A run and another that is held against it."""

    runs: tuple[Run, Run]
    labels: tuple[str, str]
    """Method and folder."""
    differing: Mapping[str, tuple[Any, Any]]
    """Settings that are not the same."""
    same_start: bool
    """The encoders began with equal weights."""
    same_batches: bool
    """Every step of both saw the same crops under the same masks."""
    records: tuple[ProbeRecord | None, ProbeRecord | None]
    baselines: Mapping[str, ProbeRecord]
    """By the names of ``BASELINES``; those that are there."""
    notes: tuple[str, ...]
    """What is missing or out of date, in words."""

    @property
    def guided_apart(self) -> bool:
        """One run had structure maps and the other had none."""
        return len({run.settings.model.guidance == "none" for run in self.runs}) == 2

    @property
    def same_encoder(self) -> bool:
        """The encoders are of one shape."""
        return _same_encoder(self.differing)


def read_comparison(run: Run, folder: Path) -> Comparison:
    """Read another run and what both were measured to be.

    Two models of one seed draw the encoder's weights first, so those are equal whatever the guidance; the heads come
    after and are not. Crops, masks and order are functions of seed, epoch and sample.

    Args:
        run: the one that the other is held against.
        folder: the other's.

    Raises:
        UserError: if the other is no pre-training run or the two cannot be compared: other pictures, masks or data,
            or figures that were measured on other images.
    """
    if folder.resolve() == run.folder.resolve():
        raise UserError(f"{folder} is the run itself; name another run to compare it with")
    other = read_run(folder)
    found = differences(run, other)
    for name, what in _WITHIN_REASON.items():
        if name in found:
            ours, theirs = found[name]
            raise UserError(
                f"{run.folder} and {folder} cannot be compared: they are of other {what} ({name} is {ours} in the one "
                f"and {theirs} in the other); name a run with the same"
            )
    runs = (run, other)
    records, baselines = _read_records(runs)
    return Comparison(
        runs=runs,
        labels=_labels(runs),
        differing=found,
        same_start=_same_start(runs, found),
        same_batches=_same_batches(runs, found),
        records=records,
        baselines=baselines,
        notes=tuple(_notes(runs, records)),
    )


def differences(run: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    """Settings of model, data, optimizer, schedule and training that two runs do not share, by name.

    Paths of one folder are the same, however they are written.
    """
    ours, theirs = (dict(_settings(each)) for each in (run, other))
    return {name: (value, theirs[name]) for name, value in ours.items() if _meant(name, value, theirs[name])}


def _settings(run: Run) -> Iterator[tuple[str, Any]]:
    content = asdict(run.settings)
    for section in _SECTIONS:
        yield from ((f"{section}.{name}", value) for name, value in content[section].items())


def _meant(name: str, ours: Any, theirs: Any) -> bool:
    if name == "model.image_size":
        ours, theirs = ((side, side) if isinstance(side, int) else tuple(side) for side in (ours, theirs))
    if name == "data.path":
        ours, theirs = Path(ours).resolve(), Path(theirs).resolve()
    return bool(ours != theirs)


def _same_start(runs: tuple[Run, Run], found: Mapping[str, Any]) -> bool:
    versions = {str(run.environment.get("torch")) for run in runs}
    return _same_encoder(found) and "train.seed" not in found and len(versions) == 1


def _same_encoder(found: Mapping[str, Any]) -> bool:
    return all(name in _GUIDANCE for name in found if name.startswith("model."))


def _same_batches(runs: tuple[Run, Run], found: Mapping[str, Any]) -> bool:
    changed = {name for name in found if name.startswith("data.")} - _NO_PART_OF_BATCHES
    return not changed and "train.seed" not in found and len({pairs_a_step(run) for run in runs}) == 1


def pairs_a_step(run: Run) -> int | None:
    """Pairs of an optimizer step, if the run says how many ranks it had."""
    ranks, train = run.environment.get("world_size"), run.settings.train
    return train.batch_size * train.accumulation_steps * ranks if isinstance(ranks, int) else None


def _labels(runs: tuple[Run, Run]) -> tuple[str, str]:
    names = [run.folder.resolve().name for run in runs]
    if names[0] == names[1]:
        names = [str(run.folder) for run in runs]
    kinds = ("SimMIM" if run.settings.model.guidance == "none" else "SG-MIM" for run in runs)
    first, second = (f"{kind} ({name})" for kind, name in zip(kinds, names, strict=True))
    return first, second


def _read_records(
    runs: tuple[Run, Run],
) -> tuple[tuple[ProbeRecord | None, ProbeRecord | None], dict[str, ProbeRecord]]:
    first, second = (_record_if_there(run.folder / PROBE) for run in runs)
    baselines = {}
    for name, file in BASELINES.items():
        for run in runs:
            if name not in baselines and (record := _record_if_there(run.folder / file)) is not None:
                baselines[name] = record
    known = [record for record in (first, second, *baselines.values()) if record is not None]
    for record in known[1:]:
        if difference := known[0].difference(record):
            raise UserError(
                f"{known[0].path} and {record.path} cannot be compared: {difference}; probe both again alike, or "
                "remove them"
            )
    return (first, second), baselines


def _record_if_there(path: Path) -> ProbeRecord | None:
    return read_record(path) if path.is_file() else None


def _notes(runs: tuple[Run, Run], records: tuple[ProbeRecord | None, ...]) -> Iterator[str]:
    for run, record in zip(runs, records, strict=True):
        if record is None:
            yield (
                f"{run.folder / PROBE} is missing, so there are no figures of its features: sgmim probe {run.folder} "
                f"--data … --dataset … --output {run.folder / PROBE}"
            )
        elif run.weights is not None and Path(record.weights).parent.name != run.weights.parent.name:
            yield (
                f"{record.path} is of {Path(record.weights).parent.name}, but {run.weights.parent.name} is the newest "
                "checkpoint of the run; probe it again."
            )
    steps = [int(run.rows[-1]["step"] or 0) if run.rows else 0 for run in runs]
    if steps[0] != steps[1]:
        yield f"The runs have not gone equally far: {steps[0]:,} and {steps[1]:,} steps."
