"""Packing a data set into shards: what ``sgmim shard`` does. ``shards`` says what is written, and reads it.

The order of the pairs, which pairs are in which shard and every byte follow from the data set, the options and the
seed, not from the number of processes. The same call again goes on where an earlier one ended: a shard whose tar file
has its own name is whole, as that name is given last.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from ctypes import Array, c_bool, c_int64
from itertools import islice
from multiprocessing import connection, resource_tracker, sharedctypes
from pathlib import Path
from typing import Any

import numpy as np

from sgmim_fast.data.members import Pairs
from sgmim_fast.data.sharding.packing import VERBATIM, Packing
from sgmim_fast.data.sharding.writer import Task, find_packed, pack_pair, pack_shard, packed_size, write_whole
from sgmim_fast.data.shards import SHARD_LIST, ShardSet, make_list, read_shards
from sgmim_fast.data.sources import open_pairs
from sgmim_fast.errors import UserError

PLAN = ".plan.json"
SKIPPED = "skipped.jsonl"
_SAMPLE = 64  # pairs that are packed to find out how many fill a shard
_TEMPORARY = re.compile(r"\.(shard-[0-9]{6}\.(tar|idx|jsonl)|shards\.json|skipped\.jsonl|\.plan\.json)\.[0-9]+\.tmp")
_MOST_SHARDS = 10**6  # their numbers have six digits
_PAUSE = 0.2  # seconds between two looks at what the processes have done


class _Stopped(Exception):
    """The calling process wants no more shards."""


def shard_pairs(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    packing: Packing = VERBATIM,
    *,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Pack the pairs of a data set into a folder of shards; the same call again completes it.

    Args:
        source: whatever ``open_pairs`` opens.
        out: a new or empty folder, or one that an earlier call with the same source and packing left unfinished.
        skip_bad: leave out pairs that cannot be read or packed, and name them in OUT/skipped.jsonl.
        workers: processes; None for one a core. With 1 the calling process packs.
        progress: called in this process with (pairs done, pairs).

    Raises:
        UserError: if the source or a pair is bad, the folder holds something else, or writing fails.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} must be 1 or more")
    source, out = Path(source), Path(out)
    pairs = open_pairs(source, structure=packing.maps != "none")
    root = os.path.join(source if source.is_dir() else source.parent, "")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _claimed(out):
            _pack(pairs, root, out, packing, skip_bad, workers, progress or (lambda done, total: None))
    except OSError as error:
        place = error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{place}: no space left; free some and run the same command again, it continues"
            ) from error
        raise UserError(f"{place}: {error.strerror or error}; choose a folder that can be written") from error
    return read_shards(out, structure=packing.maps != "none")


def _pack(
    pairs: Pairs,
    root: str,
    out: Path,
    packing: Packing,
    skip_bad: bool,
    workers: int | None,
    progress: Callable[[int, int], None],
) -> None:
    total = len(pairs)
    order = np.random.default_rng(packing.seed).permutation(total) if packing.shuffle else np.arange(total)
    per_shard = _open_folder(out, pairs, order, packing)
    cuts = range(0, total, per_shard)
    if len(cuts) > _MOST_SHARDS:
        raise UserError(
            f"{len(cuts)} shards are more than {_MOST_SHARDS}; put more pairs into each (--pairs-per-shard)"
        )
    todo = [number for number in range(len(cuts)) if not find_packed(out, number)]
    if todo:
        (out / SHARD_LIST).unlink(missing_ok=True)  # no data set is finished while one of its shards is replaced

    def task(number: int) -> Task:
        rows = order[cuts[number] : cuts[number] + per_shard].tolist()
        return Task(out, number, [pairs.members(row) for row in rows], root, packing, skip_bad)

    done = total - sum(min(per_shard, total - cuts[number]) for number in todo)
    progress(done, total)
    processes = min(workers or len(os.sched_getaffinity(0)), len(todo))
    tasks = map(task, todo)
    if processes > 1:
        _in_processes(tasks, processes, len(cuts), lambda packed: progress(done + packed, total))
    else:
        for each in tasks:
            before = done
            with closing(pack_shard(each)) as steps:
                for packed in steps:
                    done = before + packed
                    progress(done, total)
    _finish(out, len(cuts), pairs, packing)


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Keep a second call away from the folder while this one writes."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out} is being written by another `sgmim shard`; wait for it") from error
        except OSError as error:
            # Some network file systems lock no folders; the names of temporary files then keep two calls apart.
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(folder)


def _open_folder(out: Path, pairs: Pairs, order: np.ndarray, packing: Packing) -> int:
    """Record what is asked for, or check that it is what was recorded. Returns the number of pairs in a shard."""
    plan: dict[str, Any] = {"format": 1, "source": pairs.sha256, "pairs": len(pairs), "options": packing.content()}
    try:
        found = json.loads((out / PLAN).read_bytes())
        per_shard = int(found.pop("per_shard"))
        if found != plan or per_shard < 1:
            raise UserError(_other_plan(out, found, plan))
    except FileNotFoundError:
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"{out} already holds other data; choose an empty or new folder") from None
        per_shard = packing.pairs_per_shard or _fitting_pairs(pairs, order, packing)
        write_whole(out / PLAN, (json.dumps({**plan, "per_shard": per_shard}, indent=1) + "\n").encode())
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{out / PLAN} is damaged; choose an empty or new folder") from None
    for entry in list(out.iterdir()):
        if _TEMPORARY.fullmatch(entry.name):
            entry.unlink()  # what a call that was killed has left
    return per_shard


def _other_plan(out: Path, found: dict[str, Any], plan: dict[str, Any]) -> str:
    before, now = found["options"], plan["options"]
    differ = [
        f"{key} {before.get(key)} then, {now.get(key)} now" for key in before | now if before.get(key) != now.get(key)
    ]
    differ += ["another list of pairs"] if found["source"] != plan["source"] else []
    return (
        f"{out} already holds shards that were made otherwise ({'; '.join(differ) or 'by another version'}); "
        "repeat that, or choose an empty or new folder"
    )


def _fitting_pairs(pairs: Pairs, order: np.ndarray, packing: Packing) -> int:
    """How many pairs make shards of the wanted size, all of about as many; packs a few to see how large they get."""
    sizes: list[int] = []
    first_error: UserError | None = None
    for row in order[np.linspace(0, len(order) - 1, min(_SAMPLE, len(order))).astype(int)]:
        try:
            content = pack_pair(pairs.members(int(row)), packing)
        except UserError as error:
            first_error = first_error or error
        else:
            sizes.append(packed_size(content))
    if not sizes:
        assert first_error is not None, "a data set has pairs"
        raise first_error
    shards = max(1, round(len(pairs) * float(np.mean(sizes)) / (packing.shard_size * 1e6)))
    return -(-len(pairs) // shards)


def _finish(out: Path, shards: int, pairs: Pairs, packing: Packing) -> None:
    packed = [found for number in range(shards) if (found := find_packed(out, number))]
    assert len(packed) == shards, "a shard that was packed can be read"
    whole = [found.shard for found in packed if found.shard]
    skipped = [line for found in packed for line in found.skipped]
    if skipped:
        write_whole(out / SKIPPED, b"".join(skipped))
    else:
        (out / SKIPPED).unlink(missing_ok=True)
    if not whole:
        raise UserError(f"all {len(pairs)} pairs are bad; {out / SKIPPED} says why")
    source = {"sha256": pairs.sha256, "pairs": len(pairs)}
    content = make_list(
        whole, maps=packing.maps != "none", skipped=len(skipped), source=source, options=packing.content()
    )
    folder = os.open(out, os.O_RDONLY)
    try:
        os.fsync(folder)  # the shards' names reach the disk before the list does
    finally:
        os.close(folder)
    write_whole(out / SHARD_LIST, content)


def _in_processes(tasks: Iterator[Task], processes: int, shards: int, advance: Callable[[int], None]) -> None:
    """Pack shards in processes that end with this one, however it ends.

    Args:
        shards: in the whole data set.
        advance: called with the number of pairs that all processes together have packed.
    """
    context = multiprocessing.get_context("spawn")
    # Without locks, which a process that is killed could take along; every number has one writer.
    stop, done = sharedctypes.RawValue(c_bool, False), sharedctypes.RawArray(c_int64, shards)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_work, initargs=(stop, done))
    pending: set[Future[None]] = set()
    try:
        while True:
            with _interrupts_held():
                pending |= {pool.submit(_work, task) for task in islice(tasks, 2 * processes - len(pending))}
            if not pending:
                break
            ready, pending = wait(pending, timeout=_PAUSE, return_when=FIRST_COMPLETED)
            for future in ready:
                future.result()
            advance(sum(done))
    except BrokenProcessPool as error:
        raise UserError(
            "a packing process was ended from outside, perhaps for lack of memory; "
            "run the same command again with fewer --workers, it continues"
        ) from error
    finally:
        stop.value = True
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that are started here ignore Ctrl-C, which reaches the whole group; this one tells them to stop."""
    resource_tracker.ensure_running()  # its own start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_shared: tuple[c_bool, Array[c_int64]]


def _begin_work(stop: c_bool, done: Array[c_int64]) -> None:
    global _shared
    _shared = stop, done
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a process of its own"

    def end_with(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)  # the calling process is gone; what it left is removed by the next call

    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()


def _work(task: Task) -> None:
    stop, done = _shared
    with closing(pack_shard(task)) as steps:
        for count in steps:
            done[task.number] = count
            if stop.value:
                raise _Stopped
