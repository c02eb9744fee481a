"""Tables in the terminal: narrower ones say less, never half of a number."""

from io import StringIO
from types import SimpleNamespace

import pytest
from hfpatch.evals.jobs.view import Table, TableCell
from hfpatch.evals.report.tables import ViewTable
from rich.console import Console


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("lengths", [1, 4, 9])
def test_nothing_but_small_texts_is_left_out(width: int, lengths: int) -> None:
    header = ["variant", "512", "1k", "2k", "4k", "answer NLL"]
    row = ["streaming", *[TableCell("100%", "[95-100]")] * 4, " / ".join(["0.123"] * lengths)]
    told = StringIO()
    view = SimpleNamespace(title="Needles", table=Table("found", header, [row]))
    Console(file=told, width=width).print(ViewTable(view))  # type: ignore[arg-type]
    words = told.getvalue().split()
    assert words.count("0.123") == lengths and words.count("100%") == 4 and {"answer", "NLL"} <= set(words)
    assert max(map(len, told.getvalue().splitlines())) <= width
