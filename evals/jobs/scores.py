"""What jobs that score answers share: shares with their Wilson intervals, and the score's place in the answer."""

from collections.abc import Collection, Mapping, Sequence
from statistics import mean
from typing import Any

from ..run.stats import interval, tokens
from .base import FIGURE, FLAG, NUMBER, TEXT, keys
from .paired import INTERVAL, Pairs
from .view import PLAIN, SHARE, Answer, Aspect, HeatMap, Number, Row, Table, TableCell, lengths_of, names_of

ATTENDED = {"variant": TEXT, "question_in_sparse_part": FLAG, "density_prefill": NUMBER, "density_decode": NUMBER}
NLL = "answer_nll"
PAIRS = Pairs(
    "answer_nll_of_samples", ("answer_nll_difference", "answer_nll_difference_low", "answer_nll_difference_high")
)
PLACED = "stands at the end of the one prompt"
READ = "Prompt and answer were read in one forward pass"
INTERVALS = "In brackets: the 95 % Wilson interval of the share, in percent."


def attended(may_have: Mapping[str, Any] | None = None, /, **properties: Any) -> dict[str, Any]:
    """The schema of a row with densities and these keys, and with those of `may_have` if they are there."""
    return keys({NLL: FIGURE, "nll_by_steps": FLAG, **PAIRS.schema, **(may_have or {})}, **ATTENDED, **properties)


def percent(value: float) -> str:
    """A share as people write it."""
    return f"{value:.0%}"


SCORE = Aspect(
    "score", "Score: share of answers that are right.", percent,
    lambda own, dense, clear: f"scores {own:.0%} where dense scores {dense:.0%}",
)  # fmt: skip
LIKELY = Aspect(
    "answer NLL",
    "Answer NLL: mean negative log-likelihood of the true answer, nats per token, and its difference to dense; "
    "lower is better.",
    lambda value: f"{value:.3f}",
    lambda own, dense, clear: f"gives the true answer {own:.3f} nats per token where dense gives {dense:.3f}",
    more_is_better=False,
)  # fmt: skip
DENSITY = Aspect(
    "keys attended",
    "Keys attended: how much of the attention map was computed; less is faster, if the executor makes use of it.",
    percent, lambda own, dense, clear: f"attends to {own:.0%} of the keys",
)  # fmt: skip


def score_answers(rows: Sequence[Row], decode_only: Collection[str]) -> list[Answer]:
    """Score and density of every row, density in decoding for what acts there alone; answer NLL of every length."""
    found = []
    for r in rows:
        phase = "density_decode" if r["variant"] in decode_only else "density_prefill"
        found += [Answer(SCORE, r["variant"], r["score"]), Answer(DENSITY, r["variant"], float(r[phase]))]
    for (name, length), (nll, small, clear) in nll_by_length(rows).items():
        found.append(Answer(LIKELY, name, nll, length, clear, small))
    return found


def bounded(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `low` and `high` of its score, where it has one."""
    if not {"score", "samples"} <= row.keys():
        return row
    low, high = interval(row["score"], row["samples"])
    return {**row, "low": low, "high": high}


def pooled(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Mean score of rows of as many samples each, and the interval of all their samples."""
    score = mean(r["score"] for r in rows)
    return score, *interval(score, sum(r["samples"] for r in rows))


def interval_text(low: float, high: float) -> str:
    """An interval of shares in percent."""
    return f"[{low * 100:.0f}-{high * 100:.0f}]"


def by_length(rows: Sequence[Row]) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Score, low and high per variant and length."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["length"]), []).append(row)
    return {key: pooled(own) for key, own in groups.items()}


def nll_by_length(rows: Sequence[Row]) -> dict[tuple[str, int], tuple[float, str, bool]]:
    """Mean answer NLL per variant and length, where measured, its difference to dense, and whether they are apart."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if NLL in row:
            groups.setdefault((row["variant"], row["length"]), []).append(row)
    return {key: (mean(r[NLL] for r in own), *PAIRS.words(own[0])) for key, own in groups.items()}


def with_nll(rows: Sequence[Row], name: str) -> str:
    """The variant's name, with its mean answer NLL where that was measured."""
    own = [r[NLL] for r in rows if r["variant"] == name and NLL in r]
    return f"{name}, answer NLL {mean(own):.3f}" if own else name


def score_numbers(rows: Sequence[Row]) -> list[Number]:
    """Scores and answer NLL per variant and length, for comparing."""
    return [
        Number("score", name, tokens(length), score, SHARE, low, high)
        for (name, length), (score, low, high) in by_length(rows).items()
    ] + [
        Number("answer NLL", name, tokens(length), nll, PLAIN)
        for (name, length), (nll, _, _) in nll_by_length(rows).items()
    ]


def score_table(rows: Sequence[Row], title: str) -> Table:
    """Scores by variant and length with their intervals, and the keys attended to at the greatest length."""
    found, nll, lengths = by_length(rows), nll_by_length(rows), lengths_of(rows)
    body: list[list[str | TableCell]] = []
    for name in names_of(rows):
        scores = [found.get((name, n)) for n in lengths]
        last = max((r for r in rows if r["variant"] == name), key=lambda r: r["length"])
        body.append([
            name, *(TableCell(percent(s[0]), interval_text(*s[1:])) if s else "" for s in scores),
            f"{last['density_prefill']:.0%} / {last['density_decode']:.0%}",
            *([_nll_cell([nll.get((name, n)) for n in lengths])] if nll else []),
        ])  # fmt: skip
    header = ["variant", *map(tokens, lengths), "keys attended", *(["answer NLL"] if nll else [])]
    return Table(title, header, body)


def _nll_cell(found: Sequence[tuple[float, str, bool] | None]) -> TableCell:
    """Answer NLL of every length, and below it the difference to dense at the greatest."""
    return TableCell(" / ".join(f"{f[0]:.3f}" if f else "-" for f in found), found[-1][1] if found[-1] else "")


def score_notes(rows: Sequence[Row], together: bool = False) -> list[str]:
    """What the columns of a score table mean, and whether the question was prefilled under the patch."""
    inside = list(dict.fromkeys(r["variant"] for r in rows if r["question_in_sparse_part"]))
    told = f"inside the sparse part for {', '.join(inside)}" if inside else "under no sparse prefill"
    longest = tokens(lengths_of(rows)[-1])
    return [
        *(_nll_notes(rows, together) if any(NLL in r for r in rows) else []),
        INTERVALS, f"Keys attended: share in the prefill / in decoding, prompts of {longest} tokens.",
        f"The question {'follows the prefill as a call of its own' if together else PLACED}, {told}.",
    ]  # fmt: skip


def _nll_notes(rows: Sequence[Row], together: bool) -> list[str]:
    """How the answer NLL was measured."""
    read = "Question and answer were read in one call after the haystack's" if together else READ
    stepped = list(dict.fromkeys(r["variant"] for r in rows if r.get("nll_by_steps")))
    told = f"; {', '.join(stepped)}, acting in decoding alone, got the answer token by token" if stepped else ""
    return [
        "Answer NLL, by prompt length: mean negative log-likelihood of the true answer in nats per token; beside it, "
        f"for the longest prompts, the difference to dense over the same samples, {INTERVAL}, as if no two shared a "
        f"text. {read} under the patch{told}.",
    ]


def score_map(rows: Sequence[Row], label: str) -> HeatMap:
    """A panel per variant: score by depth and length."""
    panels = {
        with_nll(rows, n): {(r["depth"], r["length"]): r["score"] for r in rows if r["variant"] == n}
        for n in names_of(rows)
    }
    return HeatMap(panels, label)
