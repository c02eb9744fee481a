"""Views in the terminal."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..jobs.view import TableCell, View
from .summary import headline, sentences, views

NARROW, UNBOUND = 14, 10_000  # characters: of the first column where room is short, of endless lines
STYLES = {"good": "green", "bad": "red", "": ""}


class ViewTable:
    """A view's table as wide as it may be: small texts beside the others, below them, or left out."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.view.title}: {self.view.table.title}", style="bold")
        for between, fold in ((" ", False), ("\n", True), (None, True)):
            table = self._table(between)
            table.columns[0].max_width = NARROW if fold else None
            width = table.__rich_measure__(console, options.update(max_width=UNBOUND)).maximum
            table.columns[0].max_width = None
            if width <= options.max_width:
                break
        yield table

    def _table(self, between: str | None) -> Table:
        found = self.view.table
        table = Table(header_style="bold", box=SIMPLE)
        table.add_column(Text(found.header[0]), overflow="fold", min_width=NARROW)
        for column in found.header[1:]:
            table.add_column(Text(column), justify="right", no_wrap=True)
        for n, row in enumerate(found.cells):
            if n in found.rules:
                table.add_section()
            table.add_row(*(_text(c, between) for c in row))
        return table


def _text(cell: TableCell, between: str | None) -> Text:
    style = STYLES[cell.tone]
    if not cell.small:
        return Text(cell.text, style=style)
    text = Text(cell.text)
    return text if between is None else text.append(between + cell.small, style=style or "dim")


def print_results(results: dict[str, Any], console: Console, *, words: bool = True) -> None:
    """Every job's table, then what they say in words."""
    shown = views(results)
    for view in shown:
        console.print(ViewTable(view))
        for note in view.notes:
            console.print(Text(note, style="dim"))
        console.print()
    for line in [*(sentences(headline(results, shown)) if words else []), *results["notes"]]:
        console.print(Text(line))
