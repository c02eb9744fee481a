"""Needle in a haystack: a depth grid of a task job, scored by whether the answer holds the value."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import mean

from hfpatch.core.report import Report
from hfpatch.text import grammar
from hfpatch.text.needles import styled
from hfpatch.text.sources import sentences

from ..run.cells import Cell, Data, Session, Work
from ..run.models import Loaded
from ..run.shared_prompt import SharedPrompt
from ..run.variants import Variant
from ..tasks import Sample
from ..tasks.answers import first_line, holds
from ..tasks.frame import PLAIN, frame_of, style_of
from ..tasks.layout import compose, count_tokens
from .base import COUNT, DEPTHS, FLAG, HAYSTACK, LENGTHS, NUMBER, POSITIVE, setting
from .registry import register_job
from .scores import NLL, attended, score_answers, score_map, score_notes, score_numbers, score_table
from .task import CHAT, CHAT_HELP, NEEDLE, NEEDLE_HELP, AnswerJob
from .view import View, heading

PLACE = "end of the one prompt that holds the haystack"
TOGETHER = "a call of its own after the prefill of the haystack"


@register_job
@dataclass(frozen=True)
class NiahJob(AnswerJob):
    """Settings of a needle grid: lengths in tokens, depths in percent, samples per cell of the grid."""

    kind = "niah"
    about = "Needle in a haystack, lengths x depths."
    row = attended(length=POSITIVE, depth=NUMBER, score=NUMBER, samples=POSITIVE)

    lengths: Sequence[int] = setting(LENGTHS)
    depths: Sequence[float] = setting(DEPTHS, (0, 25, 50, 75, 100))
    samples: int = setting(COUNT, 4, "Per length and depth.")
    haystack: str = setting(HAYSTACK, "grammar")
    batch_size: int = setting(COUNT, 4)
    chat: bool | None = setting(CHAT, None, CHAT_HELP)
    needle: str | None = setting(NEEDLE, None, NEEDLE_HELP)
    nll: bool = setting(FLAG, True, "Measure the true answer's likelihood too: one more forward pass per prompt.")
    together: bool = setting(
        FLAG,
        False,
        "All depths in one haystack, prefilled once; every question goes on from a copy of its cache.",
    )
    label: str = "niah"

    @property
    def asked(self) -> int:
        """Questions of one cell."""
        return len(self.depths) * self.samples

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Batches, and what is read again; together, a step per question."""
        return self.asked if self.together else super().steps(cell, variants)

    def build(self, loaded: Loaded, length: int, seed: int) -> list[Sample]:
        """All samples of one length, the same for every variant: depth by depth, or haystack by haystack."""
        if self.together:
            every = [self._haystack(loaded, length, seed, self.depths, str(n), n) for n in range(self.samples)]
        else:
            every = [
                self._haystack(loaded, length, seed, [depth], f"{depth}-{n}", n)
                for depth in self.depths
                for n in range(self.samples)
            ]
        return [sample for samples in every for sample in samples]

    def _haystack(
        self, loaded: Loaded, length: int, seed: int, depths: Sequence[float], name: str, index: int
    ) -> list[Sample]:
        """One haystack with a needle at every depth, and a sample for each of them."""
        frame, style = frame_of(loaded.tokenizer, self.chat), style_of(loaded.tokenizer, self.needle)
        rng = random.Random(f"{self.label}-{seed}-{length}-{name}")
        pairs = [(key, grammar.random_value(rng)) for key in grammar.random_keys(rng, len(depths))]
        plain = grammar.Task(
            [grammar.needle(*pair) for pair in pairs],
            [(grammar.question(key), f" {value}") for key, value in pairs],
        )
        asked = styled(plain, style, rng)
        tails = [frame.tail(question) for question, _ in asked.turns]
        longest = max(tails, key=lambda tail: count_tokens(loaded.tokenizer, tail))
        found = compose(
            loaded.tokenizer, asked.facts, [depth / 100 for depth in depths], sentences(self.haystack, rng), length,
            tail=longest, lead=frame.before,
        )  # fmt: skip
        text, made = found.prompt.removesuffix(longest), []
        for n, ((_, value), tail, (_, answer)) in enumerate(zip(pairs, tails, asked.turns, strict=True)):
            meta = {
                "length": count_tokens(loaded.tokenizer, text + tail), "depth": depths[n] / 100,
                "depth_reached": round(found.depths[n], 4), "index": index,
                "question_place": TOGETHER if self._shares(loaded) else PLACE, "chat": frame != PLAIN, "needle": style,
            }  # fmt: skip
            made.append(Sample(text + tail, [value], meta, answer, len(text)))
        return made

    def answers(
        self, session: Session, variant: Variant, samples: Sequence[Sample], room: int, asks: bool, stepped: bool
    ) -> tuple[list[str], list[Data], Report | None]:
        """One by one as other jobs do, or all questions about a haystack after one prefill."""
        loaded = session.loaded
        if not self._shares(loaded):
            return super().answers(session, variant, samples, room, asks, stepped)
        outputs: list[str] = []
        likely: list[Data] = []
        with variant.applied(loaded.model) as patch:
            for n in range(0, len(samples), len(self.depths)):
                own = samples[n : n + len(self.depths)]
                text, prompts = own[0].prompt[: own[0].shared], [s.prompt for s in own]
                shared = SharedPrompt(loaded.model, loaded.tokenizer, text, prompts)
                for s in own:
                    outputs.append(shared.complete(s.prompt, room))
                    likely.append({NLL: shared.nll(s.prompt, s.continuation, steps=stepped)} if asks else {})
                    session.step()
            report = patch.report() if patch else None
        return outputs, likely, report

    def _shares(self, loaded: Loaded) -> bool:
        """Whether questions go on from one prefill; a model that only generates has none to go on from."""
        return self.together and callable(loaded.model)

    def room(self, loaded: Loaded, samples: Sequence[Sample]) -> int:
        """The longest value and a little, more in a chat, whose answers are dressed up."""
        spare = 8 if samples[0].meta["chat"] else 2
        return max(count_tokens(loaded.tokenizer, f" {s.answers[0]}") for s in samples) + spare

    def score(self, sample: Sample, output: str) -> float:
        """Whether the value stands in the answer."""
        return float(holds(first_line(output), sample.answers[0]))

    def expected(self, sample: Sample) -> str:
        """The value."""
        return sample.answers[0]

    def found(self, records: Sequence[Data]) -> Data:
        """The score of every depth."""
        grid = []
        for depth in self.depths:
            own = [r for r in records if r["depth"] == depth / 100]
            grid.append({"depth": depth / 100, **super().found(own)})
        return {"grid": grid, "together": self.together, "tokens": round(mean(r["tokens"] for r in records), 1)}

    def points(self, data: Data) -> Sequence[Data]:
        """A row per depth."""
        return data["grid"]

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """Every sample once."""
        if self.together:
            return Work(self.samples, 20 * len(self.depths))
        return Work(self.asked, 10, self.batch_size, read_again=self.asked * self.nll)

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Needles found by length and depth."""
        rows = entry["rows"]
        together = any(r.get("together") for r in rows)
        where = "after it, all needles being in one text" if together else "at the end of the same prompt"
        return View(
            heading("Needle in a haystack", entry),
            "A sentence with a six-digit code is hidden at a given depth of a long text, and the model is asked for "
            f"the code {where}. Each square is the share of codes it found: 0 % depth is the "
            "start of the text, 100 % the end, right before the question.",
            score_table(rows, "needles found (all depths)"), score_map(rows, "needles found"), score_numbers(rows),
            score_notes(rows, together), score_answers(rows, decode_only),
        )  # fmt: skip
