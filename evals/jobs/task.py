"""Tasks of `hfpatch.evals.tasks` under every variant: generated answers, scored."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from hfpatch.core.report import Report
from hfpatch.text.needles import STYLES

from ..errors import EvaluationError
from ..run.answer_nll import answer_nll
from ..run.cells import Cell, CellResult, Data, Session, Work
from ..run.generation import complete
from ..run.models import Loaded, check_length
from ..run.stats import tokens
from ..run.variants import Variant
from ..tasks import Sample, get_task
from .base import COUNT, FLAG, LENGTHS, NUMBER, POSITIVE, TEXT, Job, setting
from .registry import register_job
from .scores import (
    NLL,
    PAIRS,
    attended,
    bounded,
    by_length,
    nll_by_length,
    score_answers,
    score_notes,
    score_numbers,
    score_table,
    with_nll,
)
from .view import Bar, Bars, Lines, Panel, Row, Series, View, heading, lengths_of, names_of

CHAT = {"type": ["boolean", "null"]}
CHAT_HELP = "Prompts through the chat template, the question in the user's turn; null: where there is a template."
NEEDLE = {"enum": [None, *STYLES]}
NEEDLE_HELP = "How needles are said; null: in the embedded model's grammar for that model, else in ordinary words."


class AnswerJob(Job, ABC):
    """Jobs that generate answers to prompts of one length, in batches, and score them."""

    samples: int
    batch_size: int
    nll: bool

    @abstractmethod
    def build(self, loaded: Loaded, length: int, seed: int) -> list[Sample]:
        """All samples of one length; the same for every variant."""

    @abstractmethod
    def room(self, loaded: Loaded, samples: Sequence[Sample]) -> int:
        """New tokens an answer may take."""

    @abstractmethod
    def score(self, sample: Sample, output: str) -> float:
        """How right an answer is, in [0, 1]."""

    def found(self, records: Sequence[Data]) -> Data:
        """What a cell, or a part of it, has found, from its samples' records."""
        nll = {NLL: mean(r[NLL] for r in records)} if all(NLL in r for r in records) else {}
        return {"score": mean(r["score"] for r in records), "samples": len(records), **nll}

    def points(self, data: Data) -> Sequence[Data]:
        """The parts of what a cell has found, a row each."""
        return [{}]

    @property
    def asked(self) -> int:
        """Prompts of one cell."""
        return self.samples

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Batches, and what is read again."""
        return -(-self.asked // self.batch_size) + self.asked * self.nll

    def check(self, cell: Cell, session: Session) -> None:
        """The prompt and the longest answer that is known before the prompts are."""
        check_length(session.loaded, cell.length, self.least_room)

    @property
    def least_room(self) -> int:
        """New tokens that any answer may take."""
        return 1

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Answer every sample of one length under one variant."""
        loaded, variant = session.loaded, session.variant(cell.variant)
        samples = self.build(loaded, cell.length, session.seed)
        room = self.room(loaded, samples)
        check_length(loaded, cell.length, room)
        inside = variant.question_in_sparse_part
        stepped = variant.config is not None and not inside
        asks = self.nll and callable(loaded.model)  # what only generates has no likelihoods
        outputs, likely, report = self.answers(session, variant, samples, room, asks, stepped)
        records = [
            {
                "job": self.label, "variant": variant.name, **s.meta, "length": cell.length,
                "tokens": s.meta.get("length"), "expected": self.expected(s), "output": out,
                "score": self.score(s, out), "question_in_sparse_part": inside, **nll,
            }
            for s, out, nll in zip(samples, outputs, likely, strict=True)
        ]  # fmt: skip
        data = {
            **self.found(records),
            "question_in_sparse_part": inside,
            **({"nll_by_steps": stepped, PAIRS.values: [r[NLL] for r in records]} if asks else {}),
            "density_prefill": report.density("prefill") if report else 1.0,
            "density_decode": report.density("decode") if report else 1.0,
            "fallbacks": report.fallbacks() if report else {},
        }
        return CellResult(data, records)

    def answers(
        self, session: Session, variant: Variant, samples: Sequence[Sample], room: int, asks: bool, stepped: bool
    ) -> tuple[list[str], list[Data], Report | None]:
        """What the model answers to every sample, the true answers' NLL if it `asks`, and the patch's report."""
        loaded, outputs = session.loaded, []
        with variant.applied(loaded.model) as patch:
            for n in range(0, len(samples), self.batch_size):
                prompts = [s.prompt for s in samples[n : n + self.batch_size]]
                outputs += complete(loaded.model, loaded.tokenizer, prompts, room)
                session.step()
            report = patch.report() if patch else None
        return outputs, self._likely(session, variant, samples, stepped) if asks else [{} for _ in samples], report

    @staticmethod
    def _likely(session: Session, variant: Variant, samples: Sequence[Sample], stepped: bool) -> list[Data]:
        """The true answer's NLL for every sample."""
        loaded, found = session.loaded, []
        with variant.applied(loaded.model):
            for s in samples:
                nll = answer_nll(loaded.model, loaded.tokenizer, s.prompt, s.continuation, steps=stepped)
                found.append({NLL: nll})
                session.step()
        return found

    def expected(self, sample: Sample) -> str | list[str]:
        """The answer as it is recorded."""
        return sample.answers

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per length, variant and point."""
        return [
            bounded(
                {"variant": cell.variant, "length": cell.length, **point, **_shared(data), **PAIRS.apart(cell, done)}
            )
            for cell, data in done.items()
            for point in self.points(data)
        ]


def _shared(data: Data) -> Data:
    return {k: v for k, v in data.items() if k not in ("grid", PAIRS.values)}


@register_job
@dataclass(frozen=True)
class TaskJob(AnswerJob):
    """Settings of a task: prompt lengths in tokens, samples per length, the task's own options."""

    kind = "task"
    about = "A task of hfpatch.evals.tasks: single, multi_key, multi_value, variable_tracking, ..."
    takes_any_name = True
    row = attended(length=POSITIVE, score=NUMBER, samples=POSITIVE)

    task: str = setting(TEXT)
    lengths: Sequence[int] = setting(LENGTHS)
    samples: int = setting(COUNT, 20, "Per length.")
    batch_size: int = setting(COUNT, 4)
    chat: bool | None = setting(CHAT, None, CHAT_HELP)
    needle: str | None = setting(NEEDLE, None, NEEDLE_HELP)
    nll: bool = setting(FLAG, True, "Measure the true answer's likelihood too: one more forward pass per prompt.")
    options: Mapping[str, Any] = setting({"type": "object"}, {}, "The task's own settings.")
    label: str = ""

    @classmethod
    def from_recipe(cls, name: str, settings: Data) -> Job:
        """A job for the task of that name."""
        return cls(name, **{"label": name, **settings})

    def problem(self) -> tuple[tuple[str, ...], str] | None:
        """A task or an option that there is not."""
        try:
            known = get_task(self.task).options
        except EvaluationError as error:
            return ("task",), str(error)
        unknown = sorted(set(self.options) - set(known))
        if not unknown:
            return None
        listed = ", ".join(sorted(known))
        return ("options", unknown[0]), f"{self.task} has no option {unknown[0]!r}; options are {listed}."

    def build(self, loaded: Loaded, length: int, seed: int) -> list[Sample]:
        """The task's samples."""
        options = {"chat": self.chat, "needle": self.needle, **self.options}
        return get_task(self.task).samples(loaded.tokenizer, length, self.samples, seed, **options)

    def room(self, loaded: Loaded, samples: Sequence[Sample]) -> int:
        """As the task says."""
        return self.least_room

    @property
    def least_room(self) -> int:
        """As the task says."""
        return get_task(self.task).max_new_tokens

    def score(self, sample: Sample, output: str) -> float:
        """Share of the sample's answers that are given."""
        return get_task(self.task).score(output, sample)

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """Every sample once."""
        return Work(self.asked, self.least_room, self.batch_size, read_again=self.asked * self.nll)

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Scores by length."""
        rows = entry["rows"]
        return View(
            heading(f"Task {entry['label']}", entry),
            "Share of the expected answers that the generated text contains, by prompt length in tokens.",
            score_table(rows, "score"), _plot(rows), score_numbers(rows), score_notes(rows),
            score_answers(rows, decode_only),
        )  # fmt: skip


def _plot(rows: Sequence[Row]) -> Lines | Bars:
    found, lengths = by_length(rows), lengths_of(rows)
    if len(lengths) == 1:
        bars = [Bar(with_nll(rows, name), *score) for (name, _), score in found.items()]
        return Bars({"": bars}, "score", note=f", prompts of {tokens(lengths[0])} tokens")
    lines = []
    for name in names_of(rows):
        own = {n: found[name, n] for n in lengths if (name, n) in found}
        score, low, high = zip(*own.values(), strict=True)
        lines.append(Series(name, list(own), score, low, high))
    panels = [Panel(lines, "score", percent=True)]
    if nll := nll_by_length(rows):
        likely = [_nll_line(nll, name) for name in names_of(rows)]
        panels.append(Panel(likely, "answer NLL (lower is better)"))
    return Lines(panels)


def _nll_line(nll: Mapping[tuple[str, int], tuple[float, str, bool]], name: str) -> Series:
    own = {length: value for (variant, length), (value, _, _) in nll.items() if variant == name}
    return Series(name, list(own), list(own.values()))
