"""Perplexity by position under every variant."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..run.cells import Cell, CellResult, Data, Session, Work
from ..run.models import check_length
from ..run.stats import tokens
from ..run.variants import Variant
from ..tasks import PerplexityByPosition
from .base import COUNT, FIGURE, LENGTHS, POSITIVE, TEXT, WHOLE, Job, setting
from .paired import INTERVAL, Pairs
from .registry import register_job
from .scores import attended
from .view import (
    PLAIN,
    Answer,
    Aspect,
    Lines,
    Number,
    Panel,
    Row,
    Series,
    Table,
    TableCell,
    View,
    heading,
    lengths_of,
    names_of,
)

ASPECT = Aspect(
    "NLL", "NLL: mean negative log-likelihood of text, nats per token, and its difference to dense; lower is better.",
    lambda value: f"{value:.3f}",
    lambda own, dense, clear: f"predicts text at {own:.3f} nats per token against {dense:.3f}",
    more_is_better=False, longest=True,
)  # fmt: skip
PAIRS = Pairs("nll_of_samples", ("difference", "difference_low", "difference_high"))
SPANS = 5  # ranges of positions in the table


@register_job
@dataclass(frozen=True)
class PerplexityJob(Job):
    """Settings: prompt lengths in tokens, samples per length, position ranges, and where the prose comes from."""

    kind = "perplexity"
    about = "Negative log-likelihood of prose by position."
    row = attended(
        PAIRS.schema, length=POSITIVE, start=WHOLE, stop=WHOLE, perplexity=FIGURE, tokens=POSITIVE, nll=FIGURE
    )  # fmt: skip

    lengths: Sequence[int] = setting(LENGTHS)
    samples: int = setting(COUNT, 4)
    buckets: int = setting(COUNT, 8, "Ranges of positions.")
    haystack: str = setting(TEXT, "prose")
    label: str = "perplexity"

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Samples."""
        return self.samples

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """Every sample once, without an answer."""
        return Work(self.samples, 0)

    def check(self, cell: Cell, session: Session) -> None:
        """The prompt."""
        check_length(session.loaded, cell.length)

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Mean negative log-likelihood in nats per range of positions, over all samples of one length."""
        loaded, variant, task = session.loaded, session.variant(cell.variant), PerplexityByPosition()
        samples = task.samples(loaded.tokenizer, cell.length, self.samples, session.seed, haystack=self.haystack)
        records: list[Data] = []
        with variant.applied(loaded.model) as patch:
            for sample in samples:
                buckets = task.measure(loaded.model, loaded.tokenizer, [sample], self.buckets)
                records.append(
                    {
                        "job": self.label, "variant": variant.name, **sample.meta, "length": cell.length,
                        "tokens": sample.meta["length"], "question_in_sparse_part": variant.question_in_sparse_part,
                        "buckets": [[b.start, b.stop, b.tokens, b.nll] for b in buckets],
                    }
                )  # fmt: skip
                session.step()
            density = patch.report().density("prefill") if patch else 1.0
        return CellResult(
            {
                "positions": _merge([r["buckets"] for r in records]), "samples": len(records),
                "nll_of_samples": [mean_nll(b[2:] for b in r["buckets"]) for r in records],
                "question_in_sparse_part": variant.question_in_sparse_part, "density_prefill": density,
                "density_decode": 1.0,
            },
            records,
        )  # fmt: skip

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per length, variant and range of positions, each with the cell's difference to dense."""
        shared = ("samples", "question_in_sparse_part", "density_prefill", "density_decode")
        apart = {c: PAIRS.apart(c, done) for c in done}
        return [
            {"variant": c.variant, "length": c.length, **point, **{k: data[k] for k in shared}, **apart[c]}
            for c, data in done.items()
            for point in data["positions"]
        ]

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Perplexity by range of positions, in the longest prompts."""
        rows, longest = entry["rows"], lengths_of(entry["rows"])[-1]
        last = [r for r in rows if r["length"] == longest]
        spans = sorted({(r["start"], r["stop"]) for r in last})
        spans = spans[:: -(-len(spans) // SPANS)]
        whole = {(n, at): _whole(rows, n, at) for n, at in dict.fromkeys((r["variant"], r["length"]) for r in rows)}
        waiting = [n for n in names_of(rows) if n in decode_only]  # nothing is said of them by this
        body: list[list[str | TableCell]] = []
        lines = []
        for name in names_of(rows):
            own = sorted((r for r in last if r["variant"] == name), key=lambda r: r["start"])
            found = {(r["start"], r["stop"]): r["perplexity"] for r in own}
            nll = _cell(whole[name, longest]) if own else ""
            body.append([name, *(f"{found[s]:.2f}" if s in found else "" for s in spans), nll])
            middles = [(r["start"] + r["stop"]) / 2 for r in own]
            lines.append(Series(name, middles, [r["perplexity"] for r in own]))
        title = f"prompts of {longest} tokens"
        return View(
            heading("Perplexity by position", entry),
            "How well prose is predicted early and late in the context; lower is better. A method that loses old "
            "context stays flat where dense keeps falling.",
            Table(title, ["variant", *(f"from {start}" for start, _ in spans), "NLL"], body),
            Lines(
                [Panel(lines, "perplexity (lower is better)")], "position of the predicted token", lengths=False,
                note=f", prompts of {longest} tokens",
            ),
            [*map(_number, rows), *(Number("NLL", n, tokens(at), w.nll, PLAIN) for (n, at), w in whole.items())],
            [
                "NLL: mean negative log-likelihood over all positions in nats per token; beside it the difference to "
                f"dense over the same samples, {INTERVAL}.",
                *(f"{n} acts in decode steps alone, and this text was read at once." for n in waiting),
            ],
            [Answer(ASPECT, n, w.nll, at, w.clear, w.small) for (n, at), w in whole.items() if n not in waiting],
        )  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """NLL over all positions of one variant and length, and its difference to dense in words."""

    nll: float
    small: str
    clear: bool


def _whole(rows: Sequence[Row], name: str, length: int) -> Whole:
    own = [r for r in rows if (r["variant"], r["length"]) == (name, length)]
    nll = float(sum(r["tokens"] * r["nll"] for r in own) / sum(r["tokens"] for r in own))
    return Whole(nll, *PAIRS.words(own[0]))


def _cell(found: Whole) -> str | TableCell:
    return TableCell(f"{found.nll:.3f}", found.small) if found.small else f"{found.nll:.3f}"


def mean_nll(parts: Iterable[Sequence[float]]) -> float:
    """The mean over all tokens of parts `(tokens, mean NLL)`."""
    found = list(parts)
    return sum(n * nll for n, nll in found) / sum(n for n, _ in found)


def _number(row: Row) -> Number:
    what = f"perplexity at {row['start']} to {row['stop'] - 1}"
    return Number(what, row["variant"], tokens(row["length"]), row["perplexity"], PLAIN)


def _merge(samples: Sequence[Sequence[Sequence[float]]]) -> list[Data]:
    merged = []
    for parts in zip(*samples, strict=False):
        told = sum(p[2] for p in parts)
        nll = sum(p[2] * p[3] for p in parts) / told
        start, stop = min(p[0] for p in parts), max(p[1] for p in parts)
        merged.append({"start": start, "stop": stop, "tokens": told, "nll": nll, "perplexity": math.exp(nll)})
    return merged
