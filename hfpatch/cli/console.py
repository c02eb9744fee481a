"""What the command prints with: one console, progress bars, only on the first process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LONGEST = 1000
ROOM = 34  # of the bar and both times; on a narrower screen they would cut the last digits off the counts
FIRST = os.environ.get("RANK", "").strip() in ("", "0", "-1")  # what is no number is refused by `launched`
console = Console(quiet=not FIRST, highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def one_line(sentence: str) -> str:
    """The sentence on one line of printable characters, shortened in the middle where it is endless."""
    told = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(sentence.split()))
    return told if len(told) <= LONGEST else f"{told[: LONGEST // 2]} ... {told[-LONGEST // 2 :]}"


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps; yields the function that advances it."""
    columns: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if errors.width >= len(title) + 2 * len(str(total)) + ROOM:
        columns = (
            TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(),
        )  # fmt: skip
    with Progress(*columns, console=errors, transient=True, disable=not FIRST or not errors.is_terminal) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda: bar.advance(task)


def quieten() -> None:
    """Silence Transformers' own bars and hints; ours say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
