"""Needle in a haystack: lengths x depths, scored by whether the answer holds the value."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from hfpatch.text import grammar
from hfpatch.text.sources import sentences

from ..run.cells import Cell, CellResult, Data, Session
from ..run.generation import complete
from ..run.models import Loaded, check_length
from ..run.variants import Variant
from ..tasks.answers import holds
from ..tasks.layout import compose, count_tokens

PLACE = "end of the one prompt that holds the haystack"


@dataclass(frozen=True)
class Sample:
    """One prompt with its hidden value; the needle was to stand at `depth` and stands at `reached`, both in [0, 1]."""

    prompt: str
    value: str
    tokens: int
    depth: float
    reached: float
    index: int


@dataclass(frozen=True)
class NiahJob:
    """Settings of a needle grid: lengths in tokens, depths in percent, samples per cell of the grid."""

    lengths: Sequence[int]
    depths: Sequence[float] = (0, 25, 50, 75, 100)
    samples: int = 4
    haystack: str = "grammar"
    batch_size: int = 4
    label: str = "niah"
    kind: str = "niah"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per length and variant, the short ones first."""
        return [Cell(self.label, v.name, n) for n in sorted(self.lengths) for v in variants]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Batches."""
        return -(-len(self.depths) * self.samples // self.batch_size)

    def work(self, cell: Cell, variants: Sequence[Variant]) -> tuple[int, int, int] | None:
        """Prompts, new tokens for each, and prompts at a time."""
        return len(self.depths) * self.samples, 10, self.batch_size

    def settings(self) -> Data:
        """Arguments as plain data."""
        return {
            "lengths": list(self.lengths), "depths": list(self.depths), "samples": self.samples,
            "haystack": self.haystack, "batch_size": self.batch_size,
        }  # fmt: skip

    def build(self, loaded: Loaded, length: int, seed: int) -> list[Sample]:
        """All samples of one length; the same for every variant."""
        made = []
        for depth in self.depths:
            for index in range(self.samples):
                rng = random.Random(f"{self.label}-{seed}-{length}-{depth}-{index}")
                key, value = grammar.random_key(rng), grammar.random_value(rng)
                found = compose(
                    loaded.tokenizer, [grammar.needle(key, value)], [depth / 100], sentences(self.haystack, rng),
                    length, tail=grammar.question(key),
                )  # fmt: skip
                made.append(Sample(found.prompt, value, found.tokens, depth / 100, found.depths[0], index))
        return made

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Answer every sample of one length under one variant."""
        loaded, variant = session.loaded, session.variant(cell.variant)
        check_length(loaded, cell.length)
        samples = self.build(loaded, cell.length, session.seed)
        room = max(count_tokens(loaded.tokenizer, f" {s.value}") for s in samples) + 2
        check_length(loaded, cell.length, room)
        outputs: list[str] = []
        start = time.perf_counter()
        with variant.applied(loaded.model) as patch:
            for n in range(0, len(samples), self.batch_size):
                prompts = [s.prompt for s in samples[n : n + self.batch_size]]
                outputs += complete(loaded.model, loaded.tokenizer, prompts, room)
                session.step()
            report = patch.report() if patch else None
        seconds = time.perf_counter() - start
        records = [self._record(cell, variant, s, out) for s, out in zip(samples, outputs, strict=True)]
        data = {
            "grid": [self._point(depth / 100, records) for depth in self.depths],
            "tokens": round(mean(s.tokens for s in samples), 1),
            "question_in_sparse_part": variant.question_in_sparse_part,
            "density_prefill": report.density("prefill") if report else 1.0,
            "density_decode": report.density("decode") if report else 1.0,
            "fallbacks": report.fallbacks() if report else {},
            "seconds": seconds,
        }
        return CellResult(data, records)

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per variant, length and depth."""
        shared = ("tokens", "question_in_sparse_part", "density_prefill", "density_decode", "fallbacks")
        return [
            {"variant": cell.variant, "length": cell.length, **point, **{k: data[k] for k in shared}}
            for cell, data in done.items()
            for point in data["grid"]
        ]

    def _record(self, cell: Cell, variant: Variant, sample: Sample, output: str) -> Data:
        return {
            "job": self.label, "variant": variant.name, "length": cell.length, "tokens": sample.tokens,
            "depth": sample.depth, "depth_reached": round(sample.reached, 4), "index": sample.index,
            "expected": sample.value, "output": output, "score": float(holds(output, sample.value)),
            "question_place": PLACE, "question_in_sparse_part": variant.question_in_sparse_part,
        }  # fmt: skip

    @staticmethod
    def _point(depth: float, records: Sequence[Data]) -> Data:
        scores = [r["score"] for r in records if r["depth"] == depth]
        return {"depth": depth, "score": mean(scores), "samples": len(scores)}
