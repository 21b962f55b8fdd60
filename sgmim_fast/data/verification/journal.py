"""The results of an unfinished verification, so that the same command goes on where it was."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from sgmim_fast.data.pair_list import PairList, entry_of
from sgmim_fast.data.verification.checks import Checked, CheckSettings, stamp_of
from sgmim_fast.errors import UserError

_FORMAT = 1


class Journal:
    """A text file that grows by one line a pair; the first line says what the results depend on.

    Args:
        path: of the file; made if need be. Results of other settings are thrown away.

    Raises:
        UserError: if another process is writing it.
    """

    def __init__(self, path: Path, settings: CheckSettings) -> None:
        self.path = path
        self._header = json.dumps({"sgmim_verify_journal": _FORMAT, **asdict(settings)}).encode() + b"\n"
        self._file = open(path, "a+b")  # noqa: SIM115  # open as long as the journal is
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(f"{path} is in use: another `sgmim verify` works on this data set; wait for it") from error
        except OSError:
            pass  # a file system without locks
        self._file.seek(0)
        if self._file.readline(len(self._header)) != self._header:
            self._file.truncate(0)
            self._append(self._header)

    def results(self, pairs: PairList, root: Path) -> Iterator[tuple[int, Checked]]:
        """What is known of these pairs, by place in the list; not of files that have changed since.

        What a crash left of a last line is cut off.
        """
        self._file.seek(len(self._header))
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(self._file.tell() - len(line))
                return
            try:
                index, image, structure, *values = json.loads(line)
                entry = entry_of((image, structure))
                checked = Checked.parse(values)
                known = 0 <= index < len(pairs) and pairs.entry(index) == entry
            except (ValueError, TypeError):
                continue  # a damaged line costs one more check of one pair
            place = index if known else pairs.find(entry)
            structure = None if structure is None else os.path.join(root, structure)
            if place is not None and stamp_of(os.path.join(root, image), structure) == checked.stamp:
                yield place, checked

    def add(self, pairs: PairList, results: Iterable[tuple[int, Checked]]) -> None:
        """Append results; they outlast this process, whatever ends it."""
        lines = (json.dumps([index, *pairs[index], *checked]) + "\n" for index, checked in results)
        self._append("".join(lines).encode())

    def _append(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self, *, delete: bool = False) -> None:
        """End writing; with ``delete`` nothing is left to go on from."""
        if delete:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # what a full disk did not take is tried again here
            self._file.close()
