"""Latency against dense in one run: time to the first token, time per further token, tokens per second."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..run.backends import other_backends
from ..run.cells import Cell, CellResult, Data, Session, Work
from ..run.correctness import check_variant
from ..run.generation import text_ids
from ..run.models import check_length
from ..run.results import load_average
from ..run.stats import apart, break_even, break_even_text, spread_text, summarise, tokens
from ..run.timing import time_once
from ..run.variants import DENSE, Variant
from .base import COUNT, FLAG, LENGTHS, NUMBER, POSITIVE, TEXT, Job, keys, setting
from .registry import register_job
from .scores import attended
from .view import (
    SECONDS,
    Answer,
    Aspect,
    Bar,
    Bars,
    Lines,
    Number,
    Panel,
    Row,
    Series,
    Table,
    TableCell,
    View,
    heading,
    is_clear,
    lengths_of,
    names_of,
    new_lengths,
    of_variant,
    ratio,
    tone,
)

PHASES = {"ttft": "prefill", "tpot": "decoding"}
MOST_LINES = 8  # variants; more are drawn as bars
SPEED = "Speed: how many times as fast as dense at the longest prompts; below 1 it is slower, ~ is within the noise."
SPREAD = keys(median=NUMBER, low=NUMBER, high=NUMBER)


def _aspect(name: str, does: str, verb: str) -> Aspect:
    def says(own: float, dense: float, clear: bool) -> str:
        return f"{does} {own:.2f} times as fast" if clear else f"{does} about as fast (the spreads overlap)"

    return Aspect(name, SPEED, ratio, says, f"{verb} clearly faster than dense", longest=True)


ASPECTS = {
    "ttft": _aspect("prefill speed", "prefills", "prefill"), "tpot": _aspect("decoding speed", "decodes", "decode"),
}  # fmt: skip


@register_job
@dataclass(frozen=True)
class LatencyJob(Job):
    """Settings of a latency measurement: prompt lengths and decoded tokens, repeats per variant."""

    kind = "latency"
    about = "Time to the first and to every further token, interleaved with dense."
    group = "measure"
    timed = True
    row = attended(
        length=POSITIVE, ttft=SPREAD, tpot=SPREAD, ttft_speedup=NUMBER, tpot_speedup=NUMBER, ttft_clear=FLAG,
        tpot_clear=FLAG, tokens_per_second=NUMBER, load_before={"type": ["number", "null"]},
    )  # fmt: skip
    entry = keys(
        settings=keys(repeats=POSITIVE),
        break_even={
            "type": "array",
            "items": keys(
                variant=TEXT, measure={"enum": list(PHASES)},
                relation={"enum": ["about", "at most", "after", "above"]}, length=POSITIVE,
            ),
        },
    )  # fmt: skip

    lengths: Sequence[int] = setting(LENGTHS)
    decode_tokens: int = setting(COUNT, 32)
    repeats: int = setting(COUNT, 4)
    warmup: int = setting({"type": "integer", "minimum": 0, "maximum": 1000000}, 1)
    label: str = "latency"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per length, in which the variants take turns."""
        return [Cell(self.label, "", n) for n in sorted(self.lengths)]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Generate calls."""
        return self.repeats * len(variants)

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """All repeats, the warm-up and the check of the executors."""
        return Work((self.repeats + self.warmup + 1) * len(variants), self.decode_tokens)

    def settings(self) -> Data:
        """The settings, and the order of the runs."""
        return {**super().settings(), "order": "interleaved, reversed and rotated"}

    def check(self, cell: Cell, session: Session) -> None:
        """The prompt and what is decoded after it."""
        check_length(session.loaded, cell.length + self.decode_tokens)

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Check the executors, which warms patched variants up once, warm up, then time all in turns.

        Dense implementations other than the model's own take part where they are installed.
        """
        loaded = session.loaded
        variants = [*session.variants, *other_backends(loaded)]
        ids = text_ids(loaded, cell.length, session.seed)
        checks = {v.name: check_variant(loaded, v, ids).to_dict() for v in variants if v.config}
        before = load_average()
        for variant in variants:
            done = 1 if variant.config else 0
            with variant.applied(loaded.model):
                for _ in range(done, self.warmup):
                    time_once(loaded, ids, 2)
        times: dict[str, list[tuple[float, float]]] = {v.name: [] for v in variants}
        reports: dict[str, Data] = {}
        for turn in range(self.repeats):
            for variant in turn_order(variants, turn):
                with variant.applied(loaded.model) as patch:
                    times[variant.name].append(time_once(loaded, ids, self.decode_tokens))
                    reports[variant.name] = _density(patch)
                if variant in session.variants:
                    session.step()
        load = {"load_before": before, "load_after": load_average()}
        rows = [
            {**_row(v, times[v.name], times[DENSE]), **reports[v.name], "check": checks.get(v.name), **load}
            for v in variants
        ]
        return CellResult({"rows": rows})

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per length and variant."""
        return [{"length": cell.length, **row} for cell, data in done.items() for row in data["rows"]]

    def more(self, rows: Sequence[Data]) -> Data:
        """From which length on each variant is faster."""
        return {"break_even": break_evens(rows)}

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Times with their spread and the ratio to dense, then the break-even lengths."""
        rows = sorted(entry["rows"], key=lambda r: r["length"])
        body = [
            [
                r["variant"], TableCell(tokens(r["length"]), f"{r['density_prefill']:.0%}, {r['density_decode']:.0%}"),
                _time(r, "ttft"), _time(r, "tpot", f", {r['tokens_per_second']:.0f}/s"),
            ]
            for r in rows
        ]  # fmt: skip
        title = f"median (spread) over {entry['settings']['repeats']} interleaved runs"
        header = ["variant", "prompt", "to first token", "per further token"]
        return View(
            heading("Latency", entry),
            "Seconds until the first token (the prefill) and per further token (decoding), median over interleaved "
            "runs; bars show the spread. Compare numbers within this page only.",
            Table(title, header, body, new_lengths(rows)), _plot(rows),
            [n for r in rows for n in (_number(r, "ttft", "to first token"), _number(r, "tpot", "per token"))],
            _notes(rows, entry["break_even"]), [a for r in rows for a in _answers(r)],
        )  # fmt: skip


def turn_order(variants: Sequence[Variant], turn: int) -> list[Variant]:
    """The order of one turn: reversed every other time and rotated every two, so that nobody keeps a place."""
    start = turn // 2 * max(1, len(variants) // 2) % len(variants)
    order = [*variants[start:], *variants[:start]]
    return order if turn % 2 == 0 else order[::-1]


def _density(patch: Any) -> Data:
    if patch is None:
        return {"density_prefill": 1.0, "density_decode": 1.0, "executors": [], "fallbacks": {}}
    report = patch.report()
    return {
        "density_prefill": report.density("prefill"),
        "density_decode": report.density("decode"),
        "executors": sorted({name for line in report.lines for name in line.stats.executors}),
        "fallbacks": report.fallbacks(),
    }


def _row(variant: Variant, times: Sequence[tuple[float, float]], dense: Sequence[tuple[float, float]]) -> Data:
    ttft, tpot = (summarise([t[n] for t in times]) for n in (0, 1))
    slow = {"ttft": summarise([t[0] for t in dense]), "tpot": summarise([t[1] for t in dense])}
    return {
        "variant": variant.name,
        "question_in_sparse_part": variant.question_in_sparse_part,
        "ttft": ttft,
        "tpot": tpot,
        "tokens_per_second": 1 / tpot["median"],
        "ttft_speedup": slow["ttft"]["median"] / ttft["median"],
        "tpot_speedup": slow["tpot"]["median"] / tpot["median"],
        "ttft_clear": apart(ttft, slow["ttft"]),
        "tpot_clear": apart(tpot, slow["tpot"]),
    }


def break_evens(rows: Sequence[Data]) -> list[Data]:
    """Per variant but dense: the length from which on its prefill and its decoding are faster."""
    found = []
    for name in dict.fromkeys(r["variant"] for r in rows if r["variant"] != DENSE):
        own = [r for r in rows if r["variant"] == name]
        for measure in ("ttft", "tpot"):
            speedups = {r["length"]: r[f"{measure}_speedup"] for r in own}
            clear = {r["length"] for r in own if r[f"{measure}_clear"]}
            found.append({"variant": name, "measure": measure, **break_even(speedups, clear)})
    return found


def _time(row: Row, measure: str, more: str = "") -> TableCell:
    speedup, clear = row[f"{measure}_speedup"], is_clear(row, measure)
    return TableCell(
        spread_text(row[measure]), f"{ratio(speedup, clear)} x dense{more}", tone(speedup) if clear else ""
    )


def _number(row: Row, measure: str, what: str) -> Number:
    found = row[measure]
    length = tokens(row["length"])
    return Number(what, row["variant"], length, found["median"], SECONDS, found["low"], found["high"])


def _answers(row: Row) -> list[Answer]:
    return [
        Answer(aspect, row["variant"], float(row[f"{m}_speedup"]), row["length"], is_clear(row, m))
        for m, aspect in ASPECTS.items()
    ]


def _notes(rows: Sequence[Row], found: Sequence[Row]) -> list[str]:
    told = [
        "x dense: how many times as fast as dense in this run, ~ where their spreads overlap. Beside the prompt: keys "
        "attended in the prefill, in decoding."
    ]
    told += [f"{b['variant']}: {PHASES[b['measure']]} is {break_even_text(b)}." for b in found]
    loads = [r["load_before"] for r in rows if r["load_before"] is not None]
    return [*told, f"Load average while measuring: {min(loads):.1f} to {max(loads):.1f}."] if loads else told


def _plot(rows: Sequence[Row]) -> Lines | Bars:
    names, lengths = names_of(rows), lengths_of(rows)
    speed = "speed relative to dense (above 1: faster)"
    if len(names) > MOST_LINES:
        last = [r for r in rows if r["length"] == lengths[-1] and r["variant"] != DENSE]
        titles = {"ttft": "to the first token", "tpot": "per further token"}
        groups = {t: [Bar(r["variant"], r[f"{m}_speedup"]) for r in last] for m, t in titles.items()}
        return Bars(groups, speed, ".2f", 1, f", prompts of {tokens(lengths[-1])} tokens")
    times: dict[str, list[Series]] = {"ttft": [], "tpot": []}
    ratios = []
    for name in names:
        own = of_variant(rows, name)
        x = [r["length"] for r in own]
        for measure, unit in (("ttft", 1), ("tpot", 1000)):
            y, low, high = ([r[measure][k] * unit for r in own] for k in ("median", "low", "high"))
            times[measure].append(Series(name, x, y, low, high))
            if name != DENSE:
                ratios.append(Series(name, x, [r[f"{measure}_speedup"] for r in own], dashed=measure == "tpot"))
    return Lines([
        Panel(times["ttft"], "time to first token (s)", log=True),
        Panel(times["tpot"], "time per further token (ms)", log=True),
        Panel(ratios, speed, baseline=1, styles=("to first token", "per further token")),
    ])  # fmt: skip
