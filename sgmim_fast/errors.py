"""The one exception that is meant for the person at the keyboard, and how entry points show it."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER = 2
"""Something that a person must mend; queuing the run again meets it again."""
EXIT_LOST = os.EX_UNAVAILABLE  # 69
"""Another rank was lost, or nothing moved within the time allowed: queue again with --resume auto."""
EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75
"""Told to stop, and stopped after writing a checkpoint: queue again with --resume auto."""
EXIT_READER_LEFT = 141
"""What a shell calls the end of a program whose output nobody reads any more, as of `sgmim ... | head`."""

_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
)


class UserError(ValueError):
    """Bad input: one line that names the file, key or option and the remedy.

    Entry points print it as ``error: <message>`` and exit with its status; a traceback would only
    hide the line. Programming mistakes stay ordinary exceptions.
    """

    exit_status = EXIT_USER
    told_elsewhere = False
    """Whether another rank of the run is known to say the same."""


class LostPeerError(UserError):
    """Another rank of the run has ended, where its own message says why, or cannot be reached."""

    exit_status = EXIT_LOST


def first_line(error: BaseException) -> str:
    """The error of somebody else's code, to be part of a line of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input, an unwritable place and Ctrl-C into one line and an exit status (2, 69, 130).

    Where the reader of standard output has left (``| head``), end without a word.
    """
    try:
        yield
    except UserError as error:
        _stop("" if error.told_elsewhere else str(error), error.exit_status)
    except BrokenPipeError:
        if not _reader_left():
            raise
        raise SystemExit(EXIT_READER_LEFT) from None
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        where = error.filename or "a file"
        _stop(f"{where} cannot be written: {error.strerror}; free space or choose another folder", EXIT_USER)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _reader_left() -> bool:
    """Whether it is standard output that cannot be written to any more; then the rest goes nowhere."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at exit
        return True
    return False


def _stop(message: str, status: int) -> None:
    if status == EXIT_LOST or os.environ.get("LOCAL_RANK", "0") != "0":
        # The first rank of this machine mostly met the same error; the launcher then ends this one in silence.
        time.sleep(5)
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None
