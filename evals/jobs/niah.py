"""Needle in a haystack: a depth grid of a task job, scored by whether the answer holds the value."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import mean

from hfpatch.text import grammar
from hfpatch.text.needles import styled
from hfpatch.text.sources import sentences

from ..run.cells import Cell, Data, Work
from ..run.models import Loaded
from ..run.variants import Variant
from ..tasks import Sample
from ..tasks.answers import first_line, holds
from ..tasks.frame import PLAIN, frame_of, style_of
from ..tasks.layout import compose, count_tokens
from .base import COUNT, DEPTHS, FLAG, HAYSTACK, LENGTHS, NUMBER, POSITIVE, setting
from .registry import register_job
from .scores import attended, score_answers, score_map, score_notes, score_numbers, score_table
from .task import CHAT, CHAT_HELP, NEEDLE, NEEDLE_HELP, AnswerJob
from .view import View, heading

PLACE = "end of the one prompt that holds the haystack"


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
    label: str = "niah"

    @property
    def asked(self) -> int:
        """Prompts of one cell."""
        return len(self.depths) * self.samples

    def build(self, loaded: Loaded, length: int, seed: int) -> list[Sample]:
        """All samples of one length, depth by depth; the same for every variant."""
        made, frame, style = [], frame_of(loaded.tokenizer, self.chat), style_of(loaded.tokenizer, self.needle)
        for depth in self.depths:
            for index in range(self.samples):
                rng = random.Random(f"{self.label}-{seed}-{length}-{depth}-{index}")
                key, value = grammar.random_key(rng), grammar.random_value(rng)
                plain = grammar.Task([grammar.needle(key, value)], [(grammar.question(key), f" {value}")])
                asked = styled(plain, style, rng)
                question, answer = asked.turns[0]
                found = compose(
                    loaded.tokenizer, asked.facts, [depth / 100], sentences(self.haystack, rng), length,
                    tail=frame.tail(question), lead=frame.before,
                )  # fmt: skip
                meta = {
                    "length": found.tokens, "depth": depth / 100, "depth_reached": round(found.depths[0], 4),
                    "index": index, "question_place": PLACE,
                }  # fmt: skip
                made.append(Sample(found.prompt, [value], {**meta, "chat": frame != PLAIN, "needle": style}, answer))
        return made

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
        return {"grid": grid, "tokens": round(mean(r["tokens"] for r in records), 1)}

    def points(self, data: Data) -> Sequence[Data]:
        """A row per depth."""
        return data["grid"]

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """Every sample once."""
        return Work(self.asked, 10, self.batch_size, read_again=self.asked * self.nll)

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Needles found by length and depth."""
        rows = entry["rows"]
        return View(
            heading("Needle in a haystack", entry),
            "A sentence with a six-digit code is hidden at a given depth of a long text, and the model is asked for "
            "the code at the end of the same prompt. Each square is the share of codes it found: 0 % depth is the "
            "start of the text, 100 % the end, right before the question.",
            score_table(rows, "needles found (all depths)"), score_map(rows, "needles found"), score_numbers(rows),
            score_notes(rows), score_answers(rows, decode_only),
        )  # fmt: skip
