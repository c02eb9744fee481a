"""Tasks of lm-eval under every variant, by its own harness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import EvaluationError
from ..run.cells import Cell, CellResult, Data, Session
from ..run.variants import Variant


@dataclass(frozen=True)
class LmEvalJob:
    """Settings: task names, samples per task (all when None), batch size, metadata for the tasks."""

    tasks: Sequence[str]
    limit: int | None = None
    batch_size: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = "lm-eval"
    kind: str = "lm-eval"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per task and variant."""
        return [Cell(f"{self.label}/{task}", v.name, 0) for task in self.tasks for v in variants]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """One harness run."""
        return 1

    def work(self, cell: Cell, variants: Sequence[Variant]) -> tuple[int, int, int] | None:
        """Prompts, new tokens for each, and prompts at a time."""
        return None

    def settings(self) -> Data:
        """Arguments as plain data."""
        return {
            "tasks": list(self.tasks), "limit": self.limit, "batch_size": self.batch_size,
            "metadata": dict(self.metadata),
        }  # fmt: skip

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Run one task under one variant."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from hfpatch.integrations.lm_eval import HFPatchLM

        from ..tasks import LM_EVAL_FOLDER

        loaded, variant = session.loaded, session.variant(cell.variant)
        name = cell.job.removeprefix(f"{self.label}/")
        metadata = {**self.metadata, "pretrained": loaded.tokenizer.name_or_path, "seed": session.seed}
        with variant.applied(loaded.model) as patch:
            lm = HFPatchLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=self.batch_size)
            try:
                found = simple_evaluate(
                    lm, tasks=[name], limit=self.limit, metadata=metadata, log_samples=False, bootstrap_iters=0,
                    task_manager=TaskManager(include_path=str(LM_EVAL_FOLDER), metadata=metadata),
                )  # fmt: skip
            except (KeyError, ValueError, OSError, ConnectionError) as error:
                raise EvaluationError(f"lm-eval cannot run {name!r} ({error!s:.200}).") from error
            report = patch.report() if patch else None
        session.step()
        metrics = found["results"][name]
        score = next(k for k in metrics if "," in k and "_stderr" not in k)
        return CellResult(
            {
                "task": name, "metric": score.split(",")[0], "score": metrics[score],
                "samples": found["n-samples"][name]["effective"],
                "question_in_sparse_part": variant.question_in_sparse_part,
                "density_prefill": report.density("prefill") if report else 1.0,
                "density_decode": report.density("decode") if report else 1.0,
                "fallbacks": report.fallbacks() if report else {},
            }
        )  # fmt: skip

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per task and variant."""
        return [{"variant": c.variant, **d} for c, d in done.items()]
