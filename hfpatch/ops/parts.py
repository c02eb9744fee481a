"""Selections made of ranges of queries: run range by range into one output."""

from collections.abc import Callable

from hfpatch.core.selection import Rows, Selection
from hfpatch.ops.call import Problem
from hfpatch.ops.torch_output import Output


def leaves(selection: Selection) -> list[Selection]:
    """The selections of all ranges of queries; the selection itself when it has no ranges."""
    return [s for _, part in selection.parts for s in leaves(part)] if isinstance(selection, Rows) else [selection]


def run_parts(problem: Problem, out: Output, write: Callable[[Problem, Output], None]) -> None:
    """Call `write` for each range of queries with a selection of its own."""
    if not isinstance(problem.selection, Rows):
        return write(problem, out)
    for start, stop, part in problem.selection.ranges(problem.at):
        run_parts(problem.rows(start, stop, part), out.rows(start, stop), write)
