"""Structure maps from a pretrained depth estimator: one 16-bit PNG for each image of a folder.

    OUT/n01/x.png               of images/n01/x.jpg, of its stored size; every map fills 0..65535
    OUT/structure_maps.json     which estimator made them, and what the values mean
    OUT/failures.jsonl          images without a map, and why; only where there are any

Each map carries in text chunks the prediction's minimum and maximum, which undo the scaling, and a
fingerprint of its estimator, by which a later call knows what is done. With several ranks each takes
every Nth image and lists its own failures (``failures-1-of-8.jsonl``).
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sgmim_fast.data.estimation.depth_estimator import UNKNOWN, DepthEstimator, open_estimator, scale_to_16_bits
from sgmim_fast.data.estimation.launched_ranks import AddUp
from sgmim_fast.data.estimation.map_files import (
    failures_name,
    maker,
    map_path,
    remove_failures,
    write_failures,
    write_json,
    write_map,
)
from sgmim_fast.data.manifest import IMAGE_SUFFIXES, list_folder
from sgmim_fast.data.reading import read_image
from sgmim_fast.errors import UserError, first_line

SIDECAR = "structure_maps.json"
SCALING = "uint16 = round(65535 * (prediction - minimum) / (maximum - minimum)), per map; see its PNG text chunks"
_CHECKED_AT_ONCE = 256
_SHOWN = 10


@dataclass(frozen=True)
class Summary:
    """What a call left behind; the counts are this rank's, or all ranks' if the call could add them up."""

    made: int
    """Maps written now."""
    kept: int
    """Maps that an earlier call had made."""
    failed: int
    failures: tuple[tuple[str, str], ...]
    """(image, reason) of this rank's failures; paths relative to the images' folder."""
    failures_file: Path | None
    direction: str
    """"larger is nearer", "larger is farther" or "unknown"."""

    def text(self, out: str | os.PathLike[str]) -> str:
        """The result in words, with the first failures, for the screen."""
        meaning = "what larger means is unknown (--direction says it)" if self.direction == UNKNOWN else self.direction
        lines = [f"{self.made} maps made, {self.kept} kept in {out}; {meaning}"]
        if self.failed:
            where = f"listed in {self.failures_file}" if self.failures_file else f"listed in {out}/failures-*.jsonl"
            lines.append(f"{self.failed} image(s) got no map, {where}")
            # A name that is no UTF-8 cannot be printed as it is.
            shown = ((os.fsencode(name).decode(errors="replace"), why) for name, why in self.failures[:_SHOWN])
            lines += (f"  {name}: {why}" for name, why in shown)
            if len(self.failures) > _SHOWN:
                lines.append(f"  and {len(self.failures) - _SHOWN} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Prepared:
    name: str
    size: tuple[int, int]
    """(H, W) in pixels."""
    pixels: torch.Tensor
    """(1, 3, h, w) float32."""


def make_structure_maps(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str | None = None,
    direction: str | None = None,
    overwrite: bool = False,
    workers: int = 8,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    add_up: AddUp | None = None,
) -> Summary:
    """Predict a relative depth map for every image; the same call again makes only what is missing or cut short.

    Args:
        images: a folder with ``images/``, or any folder; images are found in all folders below it.
        out: the folder to write; DATA/structure for images in DATA/images.
        model: name on the Hugging Face hub, or a folder written by ``save_pretrained``.
        batch_size: images in a forward pass; only images that the model wants in one size share one.
        dtype: of the model: "fp32", "bf16", "fp16", or "auto": bf16 on CUDA, else fp32.
        device: as PyTorch names it; None for CUDA where there is a GPU, else the CPU.
        direction: "nearer" or "farther", what a larger value means; None to take it from the model's configuration.
        overwrite: make all maps anew, whoever made those that are there.
        workers: threads that decode, prepare and write.
        rank: this process makes the images rank, rank + world_size, ... of the sorted list.
        world_size: processes that share the work.
        progress: called with (images done, images of this rank).
        add_up: sums numbers over the ranks, for the counts of the summary and the sidecar; None where nothing can.

    Raises:
        UserError: if an argument makes no sense, the model cannot be used, two images would share a map, or ``out``
            holds maps that are not of this estimator. A bad image is no error; it is in the summary.
    """
    if batch_size < 1 or workers < 1:
        raise UserError(f"--batch-size {batch_size} and --workers {workers} must be 1 or more")
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} must be from 0 to {world_size - 1}, the world's size less one")
    root, out = _images_folder(Path(images)), Path(out)
    _refuse_nested(root, out)
    names = _find_images(root)
    estimator = open_estimator(model, dtype=dtype, device=device, direction=direction)
    if not overwrite:
        _refuse_other_estimator(out, estimator)
    own = names[rank::world_size]
    report = progress or (lambda done, total: None)
    try:
        with _Threads(workers) as pool:
            todo = own if overwrite else _missing(pool, out, own, estimator.identity)
            network = estimator.load() if todo else None  # may be refused, so before anything is written
            facts = {**estimator.describe(), "scaling": SCALING, "images": len(names), "ranks": world_size}
            if rank == 0:
                write_json(out / SIDECAR, {**facts, "finished": False})
                remove_failures(out, world_size)
            kept = len(own) - len(todo)
            report(kept, len(own))
            failures: dict[str, str] = {}
            if network is not None:
                run = _Run(pool, root, out, estimator, network, batch_size, 2 * (batch_size + workers))
                for done, failure in enumerate(run.work(todo), start=kept + 1):
                    failures.update(failure)
                    report(done, len(own))
        file = write_failures(out / failures_name(rank, world_size), failures)
        counts = [len(todo) - len(failures), kept, len(failures)]
        made, kept, failed = add_up(counts) if add_up else counts
        if rank == 0:
            counted = "all ranks" if add_up or world_size == 1 else "rank 0"
            counts_told = {"finished": True, "maps": made + kept, "failures": failed, "counted": counted}
            write_json(out / SIDECAR, {**facts, **counts_told})
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"{error.filename or out} cannot be written: {reason}; mend that and run the same command again, it goes on"
        ) from error
    return Summary(made, kept, failed, tuple(sorted(failures.items())), file, estimator.direction)


def _images_folder(images: Path) -> Path:
    if not images.is_dir():
        raise UserError(f"{images} is no folder; give a folder of images, or one with images/ in it")
    inner = images / "images"
    return inner if images.name != "images" and inner.is_dir() else images


def _refuse_nested(root: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder for the maps")
    inner, outer = out.resolve(), root.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UserError(f"{out} and {root} lie in one another, so maps would be taken for images; choose another OUT")


def _find_images(root: Path) -> list[str]:
    """Paths below the root, sorted.

    Raises:
        UserError: if there are none, or two differ in their suffix only.
    """
    names: list[str] = []
    pending = [""]
    while pending:
        below = pending.pop()
        images, folders = list_folder(root, below, IMAGE_SUFFIXES)
        pending += (f"{below}{folder}/" for folder in folders)
        names += images.values()
    if not names:
        raise UserError(f"{root} holds no images; known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}")
    return sorted(names)


def _refuse_other_estimator(out: Path, estimator: DepthEstimator) -> None:
    try:
        found = json.loads((out / SIDECAR).read_text(encoding="utf-8"))
        identity, name, dtype = (found[key] for key in ("estimator", "model", "dtype"))
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out / SIDECAR} is damaged; --overwrite makes all maps anew") from None
    if identity != estimator.identity:
        versions = "" if (name, dtype) != (estimator.name, estimator.dtype) else " in another version"
        raise UserError(
            f"{out} holds maps of {name} in {dtype}{versions}, not of {estimator.name} in {estimator.dtype}; "
            "choose another OUT, or --overwrite to make all anew"
        )


def _missing(pool: ThreadPoolExecutor, out: Path, names: Sequence[str], identity: str) -> list[str]:
    """Those images whose map is not there, is cut short, or is another estimator's.

    Raises:
        UserError: if a map comes from elsewhere; it is left alone.
    """
    chunks = [names[start : start + _CHECKED_AT_ONCE] for start in range(0, len(names), _CHECKED_AT_ONCE)]

    def check(chunk: Sequence[str]) -> list[str]:
        return [name for name in chunk if maker(map_path(out, name)) != identity]

    return [name for found in pool.map(check, chunks) for name in found]


@dataclass(frozen=True)
class _Run:
    """The way from file to map: threads read ahead and write behind, this thread feeds the device."""

    pool: ThreadPoolExecutor
    root: Path
    out: Path
    estimator: DepthEstimator
    model: nn.Module
    batch_size: int
    ahead: int
    """Images in memory on either side of the model, at most."""

    def work(self, names: Sequence[str]) -> Iterator[dict[str, str]]:
        """After each image {}, or {image: reason} if it gets no map."""
        groups: dict[torch.Size, list[_Prepared]] = {}  # by input shape, waiting to be a full batch
        waiting = 0
        writing: deque[Future[None]] = deque()
        for name, reading in self._read_ahead(names):
            try:
                prepared = reading.result()
            except UserError as error:
                yield {name: str(error).removeprefix(f"{self.root / name}: ")}
                continue
            groups.setdefault(prepared.pixels.shape, []).append(prepared)
            waiting += 1
            fullest = max(groups, key=lambda shape: len(groups[shape]))
            if len(groups[fullest]) == self.batch_size or waiting >= 4 * self.batch_size:
                waiting -= len(groups[fullest])
                yield from self._predict(groups.pop(fullest), writing)
        for group in groups.values():
            yield from self._predict(group, writing)
        for written in writing:
            written.result()

    def _read_ahead(self, names: Sequence[str]) -> Iterator[tuple[str, "Future[_Prepared]"]]:
        pending: deque[tuple[str, Future[_Prepared]]] = deque()
        for name in names:
            pending.append((name, self.pool.submit(self._prepare, name)))
            if len(pending) >= self.ahead:
                yield pending.popleft()
        yield from pending

    def _prepare(self, name: str) -> _Prepared:
        image = read_image(self.root / name)
        try:
            pixels = self.estimator.prepare(image)
        except Exception as error:  # the processor of another library, on an image it may find too small or too long
            raise UserError(f"the image processor refuses it ({first_line(error)})") from error
        return _Prepared(name, (image.height, image.width), pixels)

    def _predict(self, group: list[_Prepared], writing: "deque[Future[None]]") -> Iterator[dict[str, str]]:
        predictions = self.estimator.predict(self.model, [one.pixels for one in group], [one.size for one in group])
        for one, prediction in zip(group, predictions, strict=True):
            try:
                values, minimum, maximum = scale_to_16_bits(prediction)
            except UserError as error:
                yield {one.name: str(error)}
                continue
            path = map_path(self.out, one.name)
            writing.append(self.pool.submit(write_map, path, values, minimum, maximum, self.estimator.identity))
            if len(writing) > self.ahead:
                writing.popleft().result()
            yield {}


class _Threads(ThreadPoolExecutor):
    """A pool that drops what is still queued when its block ends by an error or Ctrl-C."""

    def __init__(self, workers: int) -> None:
        # PyTorch would give each of these threads as many more as there are cores.
        super().__init__(workers, initializer=torch.set_num_threads, initargs=(1,))

    def __exit__(self, *raised: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(torch.get_num_threads())  # this thread's number is again what new threads start with
