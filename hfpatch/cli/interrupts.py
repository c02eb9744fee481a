"""Ctrl-C and a request to end: quiet, with the exit code shells expect, whenever they come."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PATIENCE = 10.0  # seconds to put away what was begun; then the process is ended as it is
ENDS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def quiet_end() -> Iterator[None]:
    """A block that SIGINT and SIGTERM leave by way of its `finally`s, then the process, with code 128 + signal.

    A second signal, one that somebody swallows and one that nobody gets to ends the process at once or soon. Signals
    that are ignored stay ignored.
    """
    mine = [s for s, usual in ENDS.items() if signal.getsignal(s) == usual]
    if threading.current_thread() is not threading.main_thread() or not mine:
        yield
        return
    came: list[int] = []
    before = sys.unraisablehook

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            _end_now(number)
        raise KeyboardInterrupt

    def unraisable(what: Any) -> None:
        if came and issubclass(what.exc_type, KeyboardInterrupt):
            _end_now(came[0])
        before(what)

    try:
        for number in mine:
            signal.signal(number, end)
        sys.unraisablehook = unraisable
        with _watched():
            yield
    except BaseException:
        if not came:
            raise
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_IGN if came else ENDS[number])
        sys.unraisablehook = before
        atexit.unregister(_quiet_from_now_on)
        atexit.register(_quiet_from_now_on)
    if came:
        raise SystemExit(128 + came[0])


@contextmanager
def _watched() -> Iterator[None]:
    """A thread that ends the process where a signal's exception does not get through, as in long calculations."""
    if sys.platform == "win32":  # wakes up sockets only
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def watch() -> None:
        while came := os.read(reads, 1):
            if came[0] in ENDS:
                time.sleep(PATIENCE)
                _end_now(came[0])
        os.close(reads)

    threading.Thread(target=watch, daemon=True).start()
    old = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        os.close(writes)


def _quiet_from_now_on() -> None:
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: _end_now(number))


def _end_now(number: int) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(128 + number)
