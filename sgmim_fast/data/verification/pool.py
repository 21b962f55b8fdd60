"""Processes that check pairs; one that dies takes the pair it died of with it, and nothing else."""

import multiprocessing
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from sgmim_fast.data.verification.checks import Checked, CheckSettings, Item, MakeDecoder, PairChecker, stamp_of
from sgmim_fast.errors import UserError

CHUNK = 16
"""Pairs a message: few enough that little is lost, enough that messages cost nothing."""
_AHEAD = 2  # messages a process has before it, so that it never waits for the next
_READY = "ready"
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)

Task = list[Item]
Result = tuple[Task, list[Checked]]


def check_pairs(
    items: Iterable[Item], settings: CheckSettings, make_decoder: MakeDecoder, processes: int
) -> Generator[Result, None, None]:
    """Chunks of pairs and what was found, as they come; ends its processes when it ends or is closed.

    Args:
        make_decoder: of (loader, channels); imported by name in each process.

    Raises:
        UserError: if no decoder can be made, or a process is ended from outside.
    """
    pool = _Pool(items, settings, make_decoder)
    try:
        yield from pool.run(processes)
    finally:
        pool.end()


class _Worker:
    def __init__(self, settings: CheckSettings, make_decoder: MakeDecoder) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks: deque[Task] = deque()
        """Sent and not answered; answers come in this order."""
        self.ready = False
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, settings, make_decoder), daemon=True)
        # Ctrl-C reaches the whole process group; children inherit the block and leave it to us.
        resource_tracker.ensure_running()  # its own start would lift the block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, task: Task) -> None:
        self.tasks.append(task)
        with suppress(BrokenPipeError, ConnectionResetError):  # if it is dead, the next receive says so
            self.connection.send(task)


class _Pool:
    def __init__(self, items: Iterable[Item], settings: CheckSettings, make_decoder: MakeDecoder) -> None:
        self._items = iter(items)
        self._settings = settings
        self._make_decoder = make_decoder
        self._again: deque[Task] = deque()
        self._workers: list[_Worker] = []

    def run(self, processes: int) -> Iterator[Result]:
        for _ in range(processes):
            self._start()
        while busy := {worker.connection: worker for worker in self._workers if worker.tasks}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]  # only these were waited for
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    yield from self._bury(worker)
                    continue
                if isinstance(message, UserError):
                    raise message
                if isinstance(message, str):
                    if message != _READY:
                        raise RuntimeError(f"a verifying process failed:\n{message}")
                    worker.ready = True
                    continue
                task = worker.tasks.popleft()
                self._feed(worker)
                yield task, message

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def _start(self) -> None:
        worker = _Worker(self._settings, self._make_decoder)
        self._workers.append(worker)
        self._feed(worker)

    def _feed(self, worker: _Worker) -> None:
        while len(worker.tasks) < _AHEAD:
            task = self._again.popleft() if self._again else list(islice(self._items, CHUNK))
            if not task:
                return
            worker.send(task)

    def _bury(self, worker: _Worker) -> Iterator[Result]:
        """Find out which pair a process died of: its pairs are checked again, one at a time."""
        worker.process.join()
        code = worker.process.exitcode
        assert code is not None, "it has been joined"
        if code in _FROM_OUTSIDE:
            raise UserError(
                f"a verifying process was ended from outside ({_name(code)}); mostly memory ran out: lower --workers "
                "and run the same command again, it continues"
            )
        if not worker.ready:
            raise UserError(f"a verifying process ended at its start ({_name(code)}); check the loader's installation")
        self._workers.remove(worker)
        worker.connection.close()
        suspect = worker.tasks.popleft()
        if len(suspect) > 1:
            self._again.extend([item] for item in suspect)
        self._again.extend(worker.tasks)
        if len(suspect) == 1:
            _, image, structure = suspect[0]
            reason = f"{image}: the decoder ends its process ({_name(code)}); replace the image or its map"
            yield suspect, [Checked(stamp_of(image, structure), "ends the decoder", reason)]
        self._start()


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(connection: Connection, settings: CheckSettings, make_decoder: MakeDecoder) -> None:
    """Body of one process: ``ready``, then one list of results a task; an error or a traceback ends it."""
    warnings.simplefilter("ignore")  # decoders warn of damaged files, which the results tell
    try:
        checker = PairChecker(settings, make_decoder)
        connection.send(_READY)
        while True:
            connection.send(checker.check(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the calling process is gone
    except UserError as error:
        connection.send(error)
    except Exception:
        connection.send(traceback.format_exc())
