"""The answer in a few numbers: per variant its accuracy, density, speed and memory against dense."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ..jobs.registry import job_kinds
from ..jobs.scores import DENSITY, SCORE, percent
from ..jobs.view import Answer, Aspect, Table, TableCell, View, ratio, tone
from ..run.variants import DENSE

MANY = 6


@dataclass(frozen=True)
class Line:
    """A variant with one answer per aspect that was measured for it, in the order they were found."""

    variant: str
    answers: dict[Aspect, Answer] = field(default_factory=dict)

    def value(self, aspect: Aspect) -> float | None:
        """Its value of an aspect."""
        return self.answers[aspect].value if aspect in self.answers else None


def views(results: dict[str, Any]) -> list[View]:
    """One view per job, in order."""
    decode_only = {v["name"] for v in results["variants"] if v["acts_in"] == ["decode"]}
    kinds = job_kinds()
    return [kinds[job["kind"]].view(job, decode_only) for job in results["jobs"]]


def headline(results: dict[str, Any], shown: Sequence[View]) -> list[Line]:
    """One line per variant, from what the views answer."""
    return lines([v["name"] for v in results["variants"]], [a for view in shown for a in view.answers])


def lines(names: Sequence[str], answers: Sequence[Answer]) -> list[Line]:
    """One line per variant: the mean of all its values of an aspect, or of those at the greatest length."""
    found: dict[tuple[str, Aspect], list[Answer]] = {}
    for a in answers:
        found.setdefault((a.variant, a.aspect), []).append(a)
    aspects = list(dict.fromkeys(a.aspect for a in answers))
    return [Line(name, {a: _one(found[name, a]) for a in aspects if (name, a) in found}) for name in names]


def _one(values: Sequence[Answer]) -> Answer:
    aspect, variant, length = values[0].aspect, values[0].variant, max(a.length for a in values)
    own = [a for a in values if a.length == length or not aspect.longest]
    small = own[0].small if len(own) == 1 else ""
    return Answer(aspect, variant, mean(a.value for a in own), length, all(a.clear for a in own), small)


def score_points(found: Sequence[Line], measure: Aspect = SCORE) -> dict[str, tuple[float, float]]:
    """A measure of answers and the density, means over the scored jobs, of every variant that has both."""
    return {
        x.variant: (x.answers[measure].value, x.answers[DENSITY].value)
        for x in found
        if measure in x.answers and DENSITY in x.answers
    }


def aspects_of(found: Sequence[Line]) -> list[Aspect]:
    """All that was measured of some variant, in order."""
    return list(dict.fromkeys(aspect for line in found for aspect in line.answers))


def answer_table(found: Sequence[Line]) -> Table:
    """The page's first table."""
    aspects = aspects_of(found)
    body: list[list[str | TableCell]] = []
    for line in found:
        body.append([line.variant, *(_cell(line.answers[a]) if a in line.answers else "" for a in aspects)])
    return Table("", ["variant", *(a.name for a in aspects)], body)


def _cell(answer: Answer) -> str | TableCell:
    aspect = answer.aspect
    if not aspect.stands_out:
        return TableCell(aspect.show(answer.value), answer.small) if answer.small else aspect.show(answer.value)
    mark = tone(answer.value, aspect.more_is_better) if answer.clear else ""
    return TableCell(ratio(answer.value, answer.clear), tone=mark)


def sentences(found: Sequence[Line]) -> list[str]:
    """What the lines say, in words: a sentence per variant but dense, or, of many, which stand out."""
    dense, *others = found
    if len(others) > MANY and SCORE in dense.answers:
        return _of_many(dense.answers[SCORE].value, found)
    told = []
    for line in others:
        both = [(own, dense.answers[a]) for a, own in line.answers.items() if a in dense.answers]
        parts = [own.aspect.says(own.value, theirs.value, own.clear) for own, theirs in both]
        if parts:
            told.append(f"{line.variant} {_list(parts)}.")
    return told


def _of_many(score: float, found: Sequence[Line]) -> list[str]:
    """Which variants keep dense's score, what the others lose, and which of the former are faster or leaner."""
    scored = [(x, x.answers[SCORE].value) for x in found if x.variant != DENSE and SCORE in x.answers]
    kept = [x for x, own in scored if own >= score]
    lost = sorted(((x, own) for x, own in scored if own < score), key=lambda pair: -pair[1])
    told = [f"{len(kept)} of {len(scored)} variants score what dense scores, {percent(score)}, or more."]
    if lost:
        told.append("Below it: " + _list([f"{x.variant} with {percent(own)}" for x, own in lost]) + ".")
    for aspect in (a for a in aspects_of(found) if a.stands_out):
        if all(aspect in x.answers for x in kept):
            told.append(f"Of those that keep the score, these {aspect.stands_out}: {_best(aspect, kept)}.")
    return told


def _best(aspect: Aspect, kept: Sequence[Line]) -> str:
    own = [x.answers[aspect] for x in kept]
    more = aspect.more_is_better
    good = [a for a in own if a.clear and (a.value > 1 if more else a.value < 0.95)]
    good.sort(key=lambda a: -a.value if more else a.value)
    return _list([f"{a.variant} ({a.value:.2f} x)" for a in good]) if good else "none"


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
