"""One process per type, so that none that crashes, hangs or eats memory takes the others with it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 8 << 30
TIMEOUT = 120.0
_starting = threading.Lock()
Task = Callable[[str], Any]


def run_all(task: Task, names: Sequence[str], workers: int = 2, timeout: float = TIMEOUT) -> Iterator[tuple[str, Any]]:
    """`(name, task(name))` in the order they finish; a string says what went wrong where nothing came back."""
    with ThreadPoolExecutor(workers) as threads:
        waiting = {threads.submit(run_one, task, name, timeout): name for name in names}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def run_one(task: Task, name: str, timeout: float = TIMEOUT) -> Any:
    """`task(name)` in a process of its own, or a string that says why there is no result."""
    context = _context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, name, there), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(timeout) else f"no result within {timeout:.0f} seconds"
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()


def _context() -> Any:
    """Processes forked from one that has imported everything and started no thread, where the system can."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["survey.judge"])
    with _starting:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where it is to find what it imports
        try:
            forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
    return context


def _child(task: Task, name: str, there: Connection) -> None:
    _limit()
    there.send(task(name))
    there.close()


def _limit() -> None:
    """One thread, little memory, no chatter, no network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
