"""Perplexity by position under every variant."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..run.cells import Cell, CellResult, Data, Session
from ..run.models import check_length
from ..run.variants import Variant
from ..tasks import PerplexityByPosition


@dataclass(frozen=True)
class PerplexityJob:
    """Settings: prompt lengths in tokens, samples per length, position ranges, and where the prose comes from."""

    lengths: Sequence[int]
    samples: int = 4
    buckets: int = 8
    haystack: str = "prose"
    label: str = "perplexity"
    kind: str = "perplexity"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per length and variant, the short ones first."""
        return [Cell(self.label, v.name, n) for n in sorted(self.lengths) for v in variants]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Samples."""
        return self.samples

    def work(self, cell: Cell, variants: Sequence[Variant]) -> tuple[int, int, int] | None:
        """Prompts, new tokens for each, and prompts at a time."""
        return self.samples, 0, 1

    def settings(self) -> Data:
        """Arguments as plain data."""
        return {
            "lengths": list(self.lengths), "samples": self.samples, "buckets": self.buckets,
            "haystack": self.haystack,
        }  # fmt: skip

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Mean negative log-likelihood in nats per range of positions, over all samples of one length."""
        loaded, variant, task = session.loaded, session.variant(cell.variant), PerplexityByPosition()
        check_length(loaded, cell.length)
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
                "question_in_sparse_part": variant.question_in_sparse_part, "density_prefill": density,
                "density_decode": 1.0,
            },
            records,
        )  # fmt: skip

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per length, variant and range of positions."""
        shared = ("samples", "question_in_sparse_part", "density_prefill", "density_decode")
        return [
            {"variant": c.variant, "length": c.length, **point, **{k: data[k] for k in shared}}
            for c, data in done.items()
            for point in data["positions"]
        ]


def _merge(samples: Sequence[Sequence[Sequence[float]]]) -> list[Data]:
    merged = []
    for parts in zip(*samples, strict=False):
        told = sum(p[2] for p in parts)
        nll = sum(p[2] * p[3] for p in parts) / told
        start, stop = min(p[0] for p in parts), max(p[1] for p in parts)
        merged.append({"start": start, "stop": stop, "tokens": told, "nll": nll, "perplexity": math.exp(nll)})
    return merged
