"""Terminal tables of a run."""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..run.stats import break_even_text, memory_text, share, spread_text, time_text, tokens
from ..run.variants import DENSE
from .plots import names_of
from .summary import sentences

Row = dict[str, Any]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE)
    for n, column in enumerate(columns):
        table.add_column(
            column, justify="left" if n == 0 else "right", no_wrap=n > 0, overflow="fold", min_width=0 if n else 14
        )
    return table


def score_table(job: Row) -> RenderableType:
    """Score per variant and length, all depths together, with the density reached."""
    rows = job["rows"]
    lengths = sorted({r["length"] for r in rows})
    what = "needles found (all depths)" if job["kind"] == "niah" else "score"
    table = _table(f"{job['label']}: {what}", "variant", *map(tokens, lengths), "keys attended")
    for name in names_of(rows):
        own = [r for r in rows if r["variant"] == name]
        cells = []
        for n in lengths:
            scores = [r["score"] for r in own if r["length"] == n]
            cells.append(f"{sum(scores) / len(scores):.0%}" if scores else "")
        longest = max(own, key=lambda r: r["length"])
        table.add_row(Text(name), *cells, f"{longest['density_prefill']:.0%}")
    note = f"keys attended: share in the prefill of {tokens(lengths[-1])} tokens; "
    return Group(table, Text(note + _question_note(rows), style="dim"))


def _question_note(rows: Sequence[Row]) -> str:
    inside = [n for n in names_of(rows) if next(r for r in rows if r["variant"] == n)["question_in_sparse_part"]]
    return f"the question was inside the sparse part for {', '.join(inside)}" if inside else "no sparse prefill"


def _spread(row: Row, measure: str, more: str = "") -> Text:
    speedup, sign = row[f"{measure}_speedup"], "" if row[f"{measure}_clear"] or row["variant"] == DENSE else "~"
    text = Text(spread_text(row[measure]) + "\n")
    return text.append(f"{sign}{speedup:.2f} x dense{more}", style="dim" if speedup == 1 else "")


def latency_table(job: Row) -> RenderableType:
    """Times with their spread and the ratio to dense, then the break-even lengths."""
    title = f"{job['label']}: median (spread) over {job['settings']['repeats']} interleaved runs"
    table = _table(title, "variant", "prompt", "to first token", "per further token")
    length = None
    for r in sorted(job["rows"], key=lambda r: r["length"]):
        if length not in (None, r["length"]):
            table.add_section()
        length = r["length"]
        keys = f"{r['density_prefill']:.0%}, {r['density_decode']:.0%}"
        table.add_row(
            Text(r["variant"]), f"{tokens(length)}\n{keys}", _spread(r, "ttft"),
            _spread(r, "tpot", f", {r['tokens_per_second']:.0f}/s"),
        )  # fmt: skip
    lines = [
        "x dense: how many times as fast as dense in this run, ~ where their spreads overlap; "
        "second line: keys attended in prefill, in decoding"
    ]
    kinds = {"ttft": "prefill", "tpot": "decoding"}
    lines += [f"{b['variant']}: {kinds[b['measure']]} is {break_even_text(b)}" for b in job["break_even"]]
    return Group(table, *(Text(line, style="dim") for line in lines))


def memory_table(job: Row) -> RenderableType:
    """Peak memory above the loaded model, and its ratio to dense."""
    table = _table(
        f"{job['label']}: peak above the loaded model", "variant", "prompt", "prefill", "decoding", "/ dense"
    )
    length = None
    for r in sorted(job["rows"], key=lambda r: r["length"]):
        if length not in (None, r["length"]):
            table.add_section()
        length = r["length"]
        table.add_row(
            Text(r["variant"]), tokens(length), memory_text(r["peak_prefill"]), memory_text(r["peak_decode"]),
            f"{r['ratio']:.2f}",
        )  # fmt: skip
    return Group(table, Text(f"measured by: {job['rows'][0]['how']}", style="dim"))


def perplexity_table(job: Row) -> RenderableType:
    """Perplexity by range of positions in the longest prompts."""
    longest = max(r["length"] for r in job["rows"])
    rows = [r for r in job["rows"] if r["length"] == longest]
    spans = sorted({(r["start"], r["stop"]) for r in rows})
    spans = spans[:: -(-len(spans) // 4)]
    title = f"{job['label']}: perplexity by position, prompts of {longest} tokens"
    table = _table(title, "variant", *(f"from {a}" for a, _ in spans))
    for name in names_of(rows):
        own = {(r["start"], r["stop"]): r["perplexity"] for r in rows if r["variant"] == name}
        table.add_row(Text(name), *(f"{own[s]:.2f}" if s in own else "" for s in spans))
    return table


def lm_eval_table(job: Row) -> RenderableType:
    """lm-eval's scores."""
    table = _table(job["label"], "task", "variant", "score", "metric", "samples")
    for r in job["rows"]:
        table.add_row(Text(r["task"]), Text(r["variant"]), f"{r['score']:.4f}", Text(r["metric"]), str(r["samples"]))
    return table


def reader_table(job: Row) -> RenderableType:
    """Share of answers found per variant and length, all depths together, and what the longest text took."""
    rows = job["rows"]
    lengths = sorted({r["length"] for r in rows})
    table = _table(
        f"{job['label']}: answers found (all depths)", "variant", *map(tokens, lengths), "facts kept", "per text"
    )
    for name in names_of(rows):
        own = [r for r in rows if r["variant"] == name]
        last = [r for r in own if r["length"] == max(r["length"] for r in own)]
        kept = [r["kept"] for r in last if r["kept"] is not None]
        table.add_row(
            Text(name), *(share([r for r in own if r["length"] == n]) for n in lengths),
            f"{mean(kept):.0%}" if kept else "-",
            time_text(mean(r["seconds"] for r in last)),
        )  # fmt: skip
    note = "facts kept and seconds per text are those of the variant's longest texts"
    return Group(table, Text(note, style="dim"))


TABLES: dict[str, Callable[[Row], RenderableType]] = {
    "niah": score_table, "reader": reader_table, "task": score_table, "perplexity": perplexity_table,
    "lm-eval": lm_eval_table, "latency": latency_table, "memory": memory_table,
}  # fmt: skip


def print_results(results: Row, console: Console, *, words: bool = True) -> None:
    """Every job's table, then what they say in words."""
    for job in results["jobs"]:
        console.print(TABLES[job["kind"]](job))
        console.print()
    for line in [*(sentences(results) if words else []), *results["notes"]]:
        console.print(Text(line))
