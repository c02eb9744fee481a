"""Two result folders side by side."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..run.stats import memory_text, time_text, tokens

Row = dict[str, Any]
Values = dict[tuple[str, str, str], float]


def values(results: Row) -> Values:
    """Every number of a run by (job and measure, variant, prompt length or task)."""
    found: Values = {}
    for job in results["jobs"]:
        for what, row, value in _numbers(job):
            at = tokens(row["length"]) if "length" in row else row["task"]
            found[(f"{job['label']}: {what}", row["variant"], at)] = value
    return found


def _numbers(job: Row) -> Iterator[tuple[str, Row, float]]:
    if job["kind"] in ("niah", "reader"):
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in job["rows"]:
            groups.setdefault((row["variant"], row["length"]), []).append(row)
        for rows in groups.values():
            yield "score", rows[0], sum(r["score"] for r in rows) / len(rows)
    for row in job["rows"]:
        if job["kind"] in ("task", "lm-eval"):
            yield "score", row, row["score"]
        elif job["kind"] == "perplexity":
            yield f"perplexity at {row['start']} to {row['stop'] - 1}", row, row["perplexity"]
        elif job["kind"] == "latency":
            yield "to first token", row, row["ttft"]["median"]
            yield "per token", row, row["tpot"]["median"]
        elif job["kind"] == "memory":
            yield "peak", row, float(row["peak"])


def _shown(what: str, value: float) -> str:
    if what.endswith(("to first token", "per token")):
        return time_text(value)
    if what.endswith("peak"):
        return memory_text(value)
    return f"{value:.1%}" if what.endswith("score") else f"{value:.3f}"


def _change(what: str, a: float, b: float) -> Text:
    if what.endswith("score"):
        text, better = f"{(b - a) * 100:+.1f} points", b - a
    else:
        text, better = (f"{(b / a - 1):+.1%}" if a else "-"), a - b
    if a == b:
        return Text("same", style="dim")
    return Text(text, style="green" if better > 0 else "red")


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
        if first[key] == second[key] and not everything:
            same += 1
            continue
        what, variant, at = key
        x, y = first[key], second[key]
        table.add_row(Text(what), Text(variant), Text(at), _shown(what, x), _shown(what, y), _change(what, x, y))
    if table.row_count:
        console.print(table)
    console.print(f"{same} numbers are the same in both." if same else f"{table.row_count} numbers are in both.")
    for name, own, other in ((names[0], first, second), (names[1], second, first)):
        if missing := len(set(own) - set(other)):
            console.print(f"{missing} numbers are in {name} only.", markup=False)
    told = differences(a, b)
    console.print("made differently: " + ("; ".join(told) if told else "nothing"), style="dim", markup=False)
