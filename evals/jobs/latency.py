"""Latency against dense in one run: time to the first token, time per further token, tokens per second."""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..run.backends import other_backends
from ..run.cells import Cell, CellResult, Data, Session
from ..run.correctness import check_variant
from ..run.generation import generate_tokens, text_ids
from ..run.models import Loaded, check_length
from ..run.results import load_average
from ..run.stats import apart, break_even, summarise
from ..run.variants import DENSE, Variant


class Stopwatch:
    """A streamer that notes when each token has reached the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token, already copied to the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def time_once(loaded: Loaded, ids: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds to the first token and per further token, of one `generate` call on `ids [1, L]`."""
    gc.collect()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    watch = Stopwatch()
    start = time.perf_counter()
    generate_tokens(loaded, ids, decode_tokens + 1, watch)
    _, first, *rest = watch.times
    return first - start, (rest[-1] - first) / len(rest)


@dataclass(frozen=True)
class LatencyJob:
    """Settings of a latency measurement: prompt lengths and decoded tokens, repeats per variant."""

    lengths: Sequence[int]
    decode_tokens: int = 32
    repeats: int = 4
    warmup: int = 1
    label: str = "latency"
    kind: str = "latency"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per length, in which the variants take turns."""
        return [Cell(self.label, "", n) for n in sorted(self.lengths)]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Generate calls."""
        return self.repeats * len(variants)

    def work(self, cell: Cell, variants: Sequence[Variant]) -> tuple[int, int, int] | None:
        """Prompts, new tokens for each, and prompts at a time."""
        calls = self.repeats + self.warmup + 1
        return calls * len(variants), self.decode_tokens, 1

    def settings(self) -> Data:
        """Arguments as plain data."""
        return {
            "lengths": list(self.lengths), "decode_tokens": self.decode_tokens, "repeats": self.repeats,
            "warmup": self.warmup, "order": "interleaved, reversed and rotated",
        }  # fmt: skip

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Check the executors, which warms patched variants up once, warm up, then time all in turns.

        Dense implementations other than the model's own take part where they are installed.
        """
        loaded = session.loaded
        variants = [*session.variants, *other_backends(loaded)]
        check_length(loaded, cell.length + self.decode_tokens)
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
