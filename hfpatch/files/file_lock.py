"""Files that one owner at a time writes, among all processes and within one."""

import logging
import os
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import filelock

logger = logging.getLogger(__name__)


class FileLock:
    """A lock beside a file, held from `take` to `release`, the end of this object or that of the process."""

    def __init__(self, file: Path) -> None:
        self._file = file.with_name(f".{file.name}.lock")
        self._drop: weakref.finalize | None = None

    def take(self) -> bool:
        """Whether nobody else holds it. Where locks are impossible that is said, and nobody is kept out."""
        if self._drop is not None and self._drop.alive:
            return True
        lock = filelock.FileLock(self._file, timeout=0, thread_local=False)
        try:
            with warnings.catch_warnings(record=True) as told:  # of a substitute that outlives a killed process
                warnings.simplefilter("always")
                lock.acquire()
        except filelock.Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        else:
            self._drop = weakref.finalize(self, _release, lock, self._file, os.getpid())
            if not told:
                return True
            self._drop()
            reason = "the file system has no locks"
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
        logger.warning("%s cannot be locked (%s); let no other run write there.", self._file.parent, reason)
        return True

    def release(self) -> None:
        """Let others have it."""
        if self._drop is not None:
            self._drop()


def _release(lock: filelock.BaseFileLock, file: Path, owner: int) -> None:
    if os.getpid() != owner:
        return
    with suppress(OSError):  # elsewhere than on Unix a file in use cannot go, and may stay
        file.unlink(missing_ok=True)  # while it is held, so that it is nobody else's
    lock.release(force=True)
