"""The one exception that is meant for the person at the keyboard, and how entry points show it."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

    Entry points print it as ``error: <message>`` and exit with status 2; a traceback would only
    hide the line. Programming mistakes stay ordinary exceptions.
    """


class LostPeerError(UserError):
    """Another rank of the run has ended; its own message says why."""


def first_line(error: BaseException) -> str:
    """The error of somebody else's code, to be part of a line of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input, an unwritable place and Ctrl-C into one line and an exit status (2, 130)."""
    try:
        yield
    except UserError as error:
        _stop(str(error), others_tell=isinstance(error, LostPeerError))
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        _stop(f"{error.filename or 'a file'} cannot be written: {error.strerror}; free space or choose another folder")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _stop(message: str, others_tell: bool = False) -> None:
    if others_tell or os.environ.get("LOCAL_RANK", "0") != "0":
        # The first rank of this machine mostly met the same error; the launcher then ends this one in silence.
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
