"""The table of what was counted, in a file for readers and for the test."""

from __future__ import annotations

from pathlib import Path

from methods_list import METHODS

from .counting import EXECUTORS, LENGTH, PHASES, WAYS, Cell, Counted

PATH = Path(__file__).with_name("counts.md")
Table = dict[tuple[str, str, str], dict[str, str]]
HEAD = f"""\
# Operations and waits of one layer call

Counted on a pretended GPU (`make counts` writes this page, `tests/test_counts.py` holds the code to it): a prompt of
{LENGTH} tokens, a chunk after it, decode steps. A cell has the operations of a call / the times that the CPU waits for
the GPU in it: the layer's worst call, one number where all layers have the same, else one per layer. Views and empty
allocations are free; an operation is one launch or more.
"""


def cells(counted: Counted) -> dict[str, str]:
    """The cells of a row, by phase."""
    return {phase: _cell(cell) for phase, cell in counted.cells.items()}


def _cell(cell: Cell) -> str:
    return f"{_layers(cell.ops)} / {_layers(cell.waits)}"


def _layers(found: dict[int, int]) -> str:
    numbers = [found[n] for n in sorted(found)]
    return str(numbers[0]) if len(set(numbers)) == 1 else " ".join(map(str, numbers))


def parse(cell: str, layers: int) -> tuple[list[int], list[int]]:
    """(operations, waits) of each of so many layers."""
    ops, waits = ([int(n) for n in part.split()] for part in cell.split("/"))
    return ops * layers if len(ops) == 1 else ops, waits * layers if len(waits) == 1 else waits


def read() -> Table:
    """The table in the file."""
    table: Table = {}
    way = ""
    for line in PATH.read_text(encoding="utf-8").splitlines() if PATH.exists() else []:
        if line.startswith("## "):
            way = line[3:].lower()
        elif line.startswith("| ") and not line.startswith("| method"):
            method, executor, *found = (part.strip() for part in line.strip("|").split("|"))
            table[way, method, executor] = dict(zip(PHASES, found, strict=True))
    return table


def write(table: Table) -> None:
    """Put the table into the file."""
    out = [HEAD]
    for way in WAYS:
        out += [f"## {way.capitalize()}\n", f"| method | executor | {' | '.join(PHASES)} |", "|---" * 6 + "|"]
        for case in METHODS:
            for executor in EXECUTORS:
                if row := table.get((way, str(case), executor)):
                    out.append(f"| {case} | {executor} | {' | '.join(row[p] for p in PHASES)} |")
        out.append("")
    PATH.write_text("\n".join(out), encoding="utf-8")
