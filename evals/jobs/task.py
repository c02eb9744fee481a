"""Tasks of `hfpatch.evals.tasks` under every variant: generated answers, scored."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ..run.cells import Cell, CellResult, Data, Session
from ..run.generation import complete
from ..run.models import check_length
from ..run.variants import Variant
from ..tasks import get_task


@dataclass(frozen=True)
class TaskJob:
    """Settings of a task: prompt lengths in tokens, samples per length, the task's own options."""

    task: str
    lengths: Sequence[int]
    samples: int = 20
    batch_size: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    kind: str = "task"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per length and variant, the short ones first."""
        return [Cell(self.label, v.name, n) for n in sorted(self.lengths) for v in variants]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Batches."""
        return -(-self.samples // self.batch_size)

    def work(self, cell: Cell, variants: Sequence[Variant]) -> tuple[int, int, int] | None:
        """Prompts, new tokens for each, and prompts at a time."""
        return self.samples, get_task(self.task).max_new_tokens, self.batch_size

    def settings(self) -> Data:
        """Arguments as plain data."""
        return {
            "task": self.task, "lengths": list(self.lengths), "samples": self.samples, "batch_size": self.batch_size,
            "options": dict(self.options),
        }  # fmt: skip

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Answer every sample of one length under one variant."""
        loaded, variant, task = session.loaded, session.variant(cell.variant), get_task(self.task)
        check_length(loaded, cell.length, task.max_new_tokens)
        samples = task.samples(loaded.tokenizer, cell.length, self.samples, session.seed, **self.options)
        outputs: list[str] = []
        start = time.perf_counter()
        with variant.applied(loaded.model) as patch:
            for n in range(0, len(samples), self.batch_size):
                prompts = [s.prompt for s in samples[n : n + self.batch_size]]
                outputs += complete(loaded.model, loaded.tokenizer, prompts, task.max_new_tokens)
                session.step()
            report = patch.report() if patch else None
        inside = variant.question_in_sparse_part
        records = [
            {
                "job": self.label, "variant": variant.name, **s.meta, "length": cell.length,
                "tokens": s.meta.get("length"), "expected": s.answers, "output": out, "score": task.score(out, s),
                "question_in_sparse_part": inside,
            }
            for s, out in zip(samples, outputs, strict=True)
        ]  # fmt: skip
        data = {
            "score": mean(r["score"] for r in records),
            "samples": len(records),
            "question_in_sparse_part": inside,
            "density_prefill": report.density("prefill") if report else 1.0,
            "density_decode": report.density("decode") if report else 1.0,
            "fallbacks": report.fallbacks() if report else {},
            "seconds": time.perf_counter() - start,
        }
        return CellResult(data, records)

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per length and variant."""
        return [
            {"variant": c.variant, "length": c.length, **{k: v for k, v in d.items() if k != "seconds"}}
            for c, d in done.items()
        ]
