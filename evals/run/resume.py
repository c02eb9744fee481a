"""Whether the cells of an earlier start can be gone on from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..schema import first_problem, load_schema
from .cells import Cell, Runnable
from .journal import FIELDS, Journal
from .variants import DENSE


def check_done(journal: Journal, cells: Sequence[tuple[Runnable, Cell]]) -> None:
    """Raise FileError at a line of the journal that is no whole cell of this run."""
    known = {cell.key: (job, cell) for job, cell in cells}
    for key, line in journal.done.items():
        if key not in known:
            raise journal.problem(key, f"this run has no cell {key!r:.80}")
        missing = [name for name in FIELDS if name not in line]
        reason = f"it has no {missing[0]!r}" if missing else _wrong(*known[key], line)
        if reason:
            raise journal.problem(key, reason)


def _wrong(job: Runnable, cell: Cell, line: dict[str, Any]) -> str | None:
    data = line["data"]
    try:  # with itself as dense, for figures that are relative to it
        rows = job.rows({replace(cell, variant=DENSE): data, cell: data})
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return f"its data are not those of a cell: {type(error).__name__} {error}"
    model = load_schema("results.schema.json")["$defs"]["model"]
    return first_problem({"type": "array", "items": job.row}, rows) or first_problem(model, line["model"])
