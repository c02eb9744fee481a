"""Every kind of job with settings that take a moment and what a cell of it could have found: one line per kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfpatch.evals.jobs.audit import AuditJob
from hfpatch.evals.jobs.base import Job
from hfpatch.evals.jobs.latency import LatencyJob
from hfpatch.evals.jobs.lm_eval import LmEvalJob
from hfpatch.evals.jobs.memory import MemoryJob
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.jobs.perplexity import PerplexityJob
from hfpatch.evals.jobs.reader import ReaderJob
from hfpatch.evals.jobs.task import TaskJob

VARIANTS = ("dense", "streaming:window=32", "quest")
ATTENDED = {"question_in_sparse_part": True, "density_prefill": 0.5, "density_decode": 0.25, "fallbacks": {}}
SPREAD = {"median": 0.5, "low": 0.4, "high": 0.6}
TIMED = {
    **ATTENDED, "ttft": SPREAD, "tpot": SPREAD, "tokens_per_second": 2.0, "ttft_speedup": 1.0, "tpot_speedup": 1.5,
    "ttft_clear": False, "tpot_clear": True, "check": None, "executors": ["torch"], "load_before": None,
}  # fmt: skip
READ = {
    "depth": 0.5, "score": 0.5, "samples": 1, "kept": None, "chunks": None, "seconds": 0.5, "busy_seconds": 0.5,
    "peak": 9,
}  # fmt: skip
ESTIMATE = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 16}
MASSES = {
    "mass": ESTIMATE, "error": ESTIMATE, "kept_in_tiles": ESTIMATE, "oracle_in_tiles": {**ESTIMATE, "low": None},
    "oracle": 0.75,
}  # fmt: skip
RANGE = {"tokens": 64, "nll": 1.0, "perplexity": 2.7}


@dataclass(frozen=True)
class Kind:
    """A job, and the `data` of one of its cells."""

    job: Job
    data: Callable[[Any], dict[str, Any]]


KINDS = [
    Kind(NiahJob([64, 128], (0, 100), 1), lambda job: {
        "grid": [{"depth": d / 100, "score": 1.0, "samples": 1, "answer_nll": 0.25} for d in job.depths],
        "tokens": 60.5, "nll_by_steps": False, **ATTENDED,
    }),
    Kind(ReaderJob([256], (50,), 1), lambda job: {
        "grid": [READ], "reads_in_chunks": False, "question_in_sparse_part": False,
    }),
    Kind(TaskJob("multi_key", [64], 2, label="multi_key"), lambda job: {
        "score": 0.5, "samples": 2, "answer_nll": 0.5, "nll_by_steps": True, **ATTENDED,
    }),
    Kind(PerplexityJob([128], 1, 2), lambda job: {
        "positions": [{"start": a, "stop": a + 64, **RANGE} for a in (0, 64)], "samples": 1,
        "nll_of_samples": [1.0], **ATTENDED,
    }),
    Kind(LmEvalJob(["arc_easy"], 2), lambda job: {
        "task": "arc_easy", "metric": "acc", "score": 0.25, "samples": 2, **ATTENDED,
    }),
    Kind(LatencyJob([64, 128], 2, 2), lambda job: {"rows": [{"variant": name, **TIMED} for name in VARIANTS]}),
    Kind(AuditJob([64, 128], 1, tiles=1, new_tokens=1), lambda job: {
        "phases": [
            {"phase": p, "density": 0.5, "sparse_layers": 1, **MASSES, "layers": [{"layer": 1, **MASSES}]}
            for p in ("prefill", "decode")
        ],
        "notes": [],
    }),
    Kind(MemoryJob([64, 128]), lambda job: {
        "peak_prefill": 900, "peak_decode": 800, "peak": 900, "baseline": 5, "how": "counted",
    }),
]  # fmt: skip
