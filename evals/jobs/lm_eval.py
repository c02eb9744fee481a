"""Tasks of lm-eval under every variant, by its own harness."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EvaluationError
from ..run.cells import Cell, CellResult, Data, Session
from ..run.variants import Variant
from .base import COUNT, FIGURE, TEXT, WHOLE, Job, setting
from .registry import register_job
from .scores import attended, score_answers
from .view import SHARE, Bar, Bars, Number, Table, View, heading

NAMES = {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": "string", "minLength": 1}}


@register_job
@dataclass(frozen=True)
class LmEvalJob(Job):
    """Settings: task names, samples per task (all when None), batch size, metadata for the tasks."""

    kind = "lm-eval"
    about = "Tasks of lm-eval by name, its own and those shipped with hfpatch."
    row = attended(task=TEXT, metric=TEXT, score=FIGURE, samples=WHOLE)

    tasks: Sequence[str] = setting(NAMES)
    limit: int | None = setting(COUNT, None, "Samples per task; all when left out.")
    batch_size: int = setting(COUNT, 1)
    metadata: Mapping[str, Any] = setting({"type": "object"}, {}, "Handed to the tasks, such as max_seq_lengths.")
    label: str = "lm-eval"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per task and variant."""
        return [Cell(f"{self.label}/{task}", v.name, 0) for task in self.tasks for v in variants]

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

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Scores by task."""
        rows = entry["rows"]
        groups: dict[str, list[Bar]] = {}
        for r in rows:
            groups.setdefault(r["task"], []).append(Bar(r["variant"], r["score"]))
        body = [[r["task"], r["variant"], f"{r['score']:.4f}", r["metric"], str(r["samples"])] for r in rows]
        return View(
            heading("lm-eval", entry), "Scores as lm-eval's own harness computes them.",
            Table("scores", ["task", "variant", "score", "metric", "samples"], body), Bars(groups, "score"),
            [Number("score", r["variant"], r["task"], r["score"], SHARE) for r in rows],
            answers=score_answers(rows, decode_only),
        )  # fmt: skip
