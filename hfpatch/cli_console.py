"""What the command prints with: one console, progress bars, only on the first process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

RANK = int(os.environ.get("RANK", "0"))
console = Console(quiet=RANK != 0, highlight=False)
errors = Console(stderr=True, highlight=False)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps; yields the function that advances it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=errors, transient=True, disable=RANK != 0 or not errors.is_terminal) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda: bar.advance(task)


def quieten() -> None:
    """Silence Transformers' own bars and hints; ours say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
