"""Two result folders side by side."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..jobs.view import Number
from .summary import views

Row = dict[str, Any]
Values = dict[tuple[str, str, str], Number]


def values(results: Row) -> Values:
    """Every number of a run by (job and measure, variant, prompt length or task)."""
    found: Values = {}
    for job, view in zip(results["jobs"], views(results), strict=True):
        for number in view.numbers:
            found[(f"{job['label']}: {number.what}", number.variant, number.at)] = number
    return found


def _change(a: Number, b: Number) -> Text:
    """What changed, in points or percent; ~ and no colour where the spreads overlap."""
    if a.value == b.value:
        return Text("same", style="dim")
    if a.unit.points:
        told = f"{(b.value - a.value) * 100:+.1f} points"
    else:
        told = f"{(b.value / a.value - 1):+.1%}" if a.value else "-"
    if not _apart(a, b):
        return Text(f"~{told}", style="dim")
    return Text(told, style="green" if (b.value > a.value) == a.unit.more_is_better else "red")


def _apart(a: Number, b: Number) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return True
    return a.high < b.low or b.high < a.low


def differences(a: Row, b: Row) -> list[str]:
    """What differs in how the two runs were made, in words."""
    told = []
    for name in sorted(set(a["environment"]["versions"]) | set(b["environment"]["versions"])):
        x, y = (r["environment"]["versions"].get(name) for r in (a, b))
        if x != y:
            told.append(f"{name} {x} against {y}")
    for key in ("commit", "device", "device_name", "threads"):
        if a["environment"].get(key) != b["environment"].get(key):
            told.append(f"{key} {a['environment'].get(key)} against {b['environment'].get(key)}")
    for key in ("model", "dtype", "seed"):
        if a["arguments"].get(key) != b["arguments"].get(key):
            told.append(f"{key} {a['arguments'].get(key)} against {b['arguments'].get(key)}")
    return told


def print_comparison(a: Row, b: Row, names: tuple[str, str], console: Console, *, everything: bool = False) -> None:
    """A table of what both runs measured, then what only one did and how the runs were made differently."""
    first, second = values(a), values(b)
    table = Table(
        "measure", "variant", "prompt", *(Column(Text(name)) for name in names), "change", header_style="bold"
    )
    same = 0
    for key in first:
        if key not in second:
            continue
        x, y = first[key], second[key]
        if x.value == y.value and not everything:
            same += 1
            continue
        table.add_row(*map(Text, key), x.unit.show(x.value), y.unit.show(y.value), _change(x, y))
    if table.row_count:
        console.print(table)
    console.print(f"{same} numbers are the same in both." if same else f"{table.row_count} numbers are in both.")
    for name, own, other in ((names[0], first, second), (names[1], second, first)):
        if missing := len(set(own) - set(other)):
            console.print(f"{missing} numbers are in {name} only.", markup=False)
    if table.row_count and any(n.low is not None for n in first.values()):
        console.print("~ where the spreads (of shares: 95 % intervals) of both overlap", style="dim", markup=False)
    told = differences(a, b)
    console.print("made differently: " + ("; ".join(told) if told else "nothing"), style="dim", markup=False)
