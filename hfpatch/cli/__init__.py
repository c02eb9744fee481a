"""The `hfpatch` command. Nothing here takes time to import, so that Ctrl-C is quiet from the first moment on."""

import os
import signal
from contextlib import suppress


def main() -> None:
    """Entry point: bad input gives one sentence and exit code 2, Ctrl-C nothing and exit code 130."""
    usual = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if usual:
        _on_interrupt(lambda number, frame: os._exit(128 + number))  # nothing has been begun yet
    from .interrupts import quiet_end

    if usual:
        _on_interrupt(signal.default_int_handler)
    with quiet_end():
        from .app import run_command

        run_command()


def _on_interrupt(handler: "signal._HANDLER") -> None:
    with suppress(ValueError):  # in a thread of somebody's program, which sees to its signals itself
        signal.signal(signal.SIGINT, handler)
