"""Folders of synthetic scenes to pre-train on, rendered by several processes.

    OUT/images/000000.jpg       RGB
    OUT/structure/000000.png    16 bits: round(65535 * near / depth), 0 in the sky
    OUT/labels/000000.png       8 bits: class indices
    OUT/normals/000000.png      on request, 8 bits a channel: 127.5 * (1 + n), camera axes right, down, forward
    OUT/dataset.json            what was asked for, scale and class names; written first
    OUT/metadata.jsonl          one line a scene; written last

The bytes depend on the seed, the size and the split only, not on the number of processes, and nothing here
imports torch, which every process would load.
"""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from sgmim_fast.data.scenes.geometry import CLASS_NAMES
from sgmim_fast.data.scenes.scene import MIN_SIDE, NEAR, Scene, render_scene
from sgmim_fast.data.scenes.splits import SceneSplit, variety_of
from sgmim_fast.errors import UserError

__all__ = ["CLASS_NAMES", "NEAR", "Scene", "render_dataset", "render_scene"]

GENERATOR = 1
"""Raised whenever the same seed gives other scenes, so that one folder never mixes two versions."""

_CHUNK = 32  # scenes after which a process records that they are done
_QUALITY = 92
_PARTS = ".parts"


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Everything the content of the folder depends on."""

    generator: int
    count: int
    size: int
    seed: int
    normals: bool
    split: SceneSplit = "train"

    def stated(self) -> dict[str, Any]:
        """As the folder's description has it; those of scenes to train on have always been without a split."""
        fields = asdict(self)
        if self.split == "train":
            del fields["split"]
        return fields

    def chunks(self) -> list[range]:
        return [range(start, min(start + _CHUNK, self.count)) for start in range(0, self.count, _CHUNK)]

    def files(self, index: int) -> list[str]:
        """Paths in the folder that belong to one scene."""
        name = f"{index:06d}"
        kinds = ["images/{}.jpg", "structure/{}.png", "labels/{}.png", *(["normals/{}.png"] if self.normals else [])]
        return [kind.format(name) for kind in kinds]


def render_dataset(
    out: Path,
    *,
    count: int,
    size: int = 192,
    seed: int = 0,
    workers: int | None = None,
    normals: bool = False,
    split: SceneSplit = "train",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render scenes 0 to ``count`` - 1 of a seed into a folder; the same call again completes it.

    Args:
        out: a new or empty folder, or one that an earlier call with the same arguments left unfinished.
        size: side in pixels.
        workers: processes; None for one a core. With 1 the calling process renders.
        normals: write OUT/normals as well.
        split: "train", or "test" for scenes with textures, furniture and cameras that the former never show.
        progress: called in this process with (scenes done, count).

    Raises:
        UserError: if an argument makes no sense, the folder holds something else, or writing fails.
    """
    if count < 1:
        raise UserError(f"count {count} must be 1 or more")
    if size < MIN_SIDE:
        raise UserError(f"size {size} is too small for a scene; use {MIN_SIDE} pixels or more")
    if seed < 0:
        raise UserError(f"seed {seed} must be 0 or more")
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers} must be 1 or more")
    variety_of(split)
    out = Path(out)
    request = _Request(generator=GENERATOR, count=count, size=size, seed=seed, normals=normals, split=split)
    report = progress or (lambda done, total: None)
    try:
        todo = _open_folder(out, request)
        done = count - sum(map(len, todo))
        report(done, count)
        processes = min(workers or len(os.sched_getaffinity(0)), len(todo))
        steps = _in_processes(out, request, todo, processes) if processes > 1 else _render(out, request, todo)
        with closing(steps):
            for _ in steps:
                done += 1
                report(done, count)
        _finish(out, request)
    except OSError as error:
        raise _disk_error(out, error) from error
    return out


def _disk_error(out: Path, error: OSError) -> UserError:
    place = error.filename or out
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{place}: no space left; free some and run the same command again, it continues")
    return UserError(f"{place}: {error.strerror or error}; choose a folder that can be written")


def _open_folder(out: Path, request: _Request) -> list[range]:
    """Claim the folder and return the chunks that are still to be rendered.

    Raises:
        UserError: if it holds anything but an earlier run of the same request.
    """
    claim = out / "dataset.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder for the scenes")
    if out.is_dir() and any(out.iterdir()):
        try:
            found = dict(json.loads(claim.read_text())["request"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise UserError(f"{out} already holds other data; choose an empty or new folder") from None
        if found != request.stated():
            made = ", ".join(f"{key} {value}" for key, value in found.items())
            raise UserError(
                f"{out} already holds scenes made with other options ({made}); repeat those or choose an empty folder"
            )
    for path in (*(out / file for file in request.files(0)), _part(out, range(1))):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write(claim, (json.dumps(_description(request), indent=2) + "\n").encode())
    complete = (out / "metadata.jsonl").exists()
    todo = [
        chunk
        for chunk in request.chunks()
        if not (complete or _part(out, chunk).exists()) or not _whole(out, request, chunk)
    ]
    # A finished folder has no parts left to take lines from, so a repair renders everything again.
    return request.chunks() if complete and todo else todo


def _whole(out: Path, request: _Request, chunk: range) -> bool:
    """Whether all files of a chunk are there; an empty one is what a crash of the machine leaves."""
    try:
        return all((out / file).stat().st_size > 0 for index in chunk for file in request.files(index))
    except FileNotFoundError:
        return False


def _part(out: Path, chunk: range) -> Path:
    return out / _PARTS / f"{chunk.start:06d}.jsonl"


def _description(request: _Request) -> dict[str, Any]:
    return {
        "request": request.stated(),
        "near": NEAR,
        "structure": "uint16 = round(65535 * near / depth), depth in metres along the optical axis; 0 in the sky",
        "labels": list(CLASS_NAMES),
        "normals": "uint8 = round(127.5 * (1 + n)), n along right, down, forward; 128 in the sky",
    }


def _finish(out: Path, request: _Request) -> None:
    """Join the parts into metadata.jsonl; nothing to do where that has been done before."""
    parts = [_part(out, chunk) for chunk in request.chunks()]
    if all(part.exists() for part in parts):
        _write(out / "metadata.jsonl", b"".join(part.read_bytes() for part in parts))
    shutil.rmtree(out / _PARTS)


def _render(out: Path, request: _Request, chunks: list[range]) -> Generator[None, None, None]:
    """Render and write chunks, yielding after every scene."""
    for chunk in chunks:
        lines = []
        for index in chunk:
            scene = render_scene(request.seed, index, request.size, request.split)
            maps: tuple[NDArray[Any], ...] = (scene.rgb, scene.inverse_depth, scene.labels, scene.normals)
            for file, pixels in zip(request.files(index), maps, strict=False):
                buffer = io.BytesIO()
                if file.endswith(".jpg"):
                    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
                else:
                    Image.fromarray(pixels).save(buffer, "PNG")
                _write(out / file, buffer.getvalue())
            lines.append(json.dumps(scene.metadata) + "\n")
            if index != chunk[-1]:
                yield
        _write(_part(out, chunk), "".join(lines).encode())
        yield


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then move it to its own."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _in_processes(out: Path, request: _Request, todo: list[range], processes: int) -> Generator[None, None, None]:
    """``_render`` spread over processes that end with this one, however it ends."""
    context = multiprocessing.get_context("spawn")
    workers: list[SpawnProcess] = []
    inboxes: list[Connection] = []
    try:
        # Ctrl-C reaches the whole process group; the children inherit the block and leave it to us.
        resource_tracker.ensure_running()  # its own start would lift the block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for rank in range(processes):
                inbox, outbox = context.Pipe(duplex=False)
                share = todo[rank::processes]
                worker = context.Process(target=_work, args=(outbox, out, request, share), daemon=True)
                worker.start()
                outbox.close()
                workers.append(worker)
                inboxes.append(inbox)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while inboxes:
            ready = wait(inboxes)
            for inbox in [inbox for inbox in inboxes if inbox in ready]:
                if _receive(inbox) == "end":
                    inboxes.remove(inbox)
                else:
                    yield
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def _receive(inbox: Connection) -> str:
    """A worker's next message; its failure is raised here."""
    try:
        kind, value = inbox.recv()
    except EOFError:
        raise UserError(
            "a rendering process was ended from outside, perhaps for lack of memory; run it again with fewer workers"
        ) from None
    if kind == "disk":
        raise OSError(*value)
    if kind == "bug":
        raise RuntimeError(f"a rendering process failed:\n{value}")
    return str(kind)


def _work(outbox: Connection, out: Path, request: _Request, chunks: list[range]) -> None:
    """Body of one process: a message a scene, then ``end``, or what went wrong."""
    try:
        for _ in _render(out, request, chunks):
            outbox.send(("scene", None))
        outbox.send(("end", None))
    except BrokenPipeError:
        return  # the calling process is gone
    except OSError as error:
        outbox.send(("disk", (error.errno, error.strerror, error.filename)))
    except Exception:
        outbox.send(("bug", traceback.format_exc()))
