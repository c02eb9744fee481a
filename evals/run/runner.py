"""Runs the cells of all jobs, journals them, and writes the results."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpatch.files.output import writable

from ..errors import EvaluationError
from .cells import Cell, Data, Runnable, Session
from .results import JOURNAL, RESULTS, SAMPLES, Journal, environment, write_json, write_jsonl
from .resume import check_done
from .shards import Shard, merge_journals, shard_journals
from .variants import Variant

Cells = Sequence[tuple[Runnable, Cell]]
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Run:
    """Everything that decides what a run measures."""

    title: str
    model: str
    variants: Sequence[Variant]
    jobs: Sequence[Runnable]
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    about: str = ""
    notes: Sequence[str] = ()

    def cells(self) -> list[tuple[Runnable, Cell]]:
        """All cells in order."""
        return [(job, cell) for job in self.jobs for cell in job.cells(self.variants)]

    def steps(self, cells: Cells) -> int:
        """Progress steps of these cells."""
        return sum(job.steps(cell, self.variants) for job, cell in cells)

    def arguments(self) -> Data:
        """What was asked for, as plain data; two runs with equal arguments give equal results, times aside."""
        asked = {
            "title": self.title, "about": self.about, "model": self.model, "dtype": self.dtype, "device": self.device,
            "seed": self.seed, "variants": [v.to_dict() for v in self.variants],
            "jobs": [{"label": j.label, "kind": j.kind, **j.settings()} for j in self.jobs],
        }  # fmt: skip
        return json.loads(json.dumps(asked))


def _no_progress(title: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


def execute(run: Run, out: Path, *, fresh: bool = False, progress: Progress = _no_progress) -> Data | None:
    """Run what is not yet in the folder's journal, write results.json and samples.jsonl, return the results.

    Started several times by `accelerate launch`, the processes share the cells; all but the first return None. Raises
    ConfigError when the folder cannot be written, EvaluationError when it is in use or holds something else.
    """
    shard = Shard.from_environment()
    for job in run.jobs:
        if not job.cells(run.variants):
            raise EvaluationError(f"There is nothing to do for {job.label!r}; it has no length for any variant.")
    with writable(out, (JOURNAL, RESULTS, SAMPLES)):
        main = Journal(out / JOURNAL, run.arguments())
        try:
            return _execute(run, out, shard, main, fresh, progress)
        finally:
            main.close()


def _execute(run: Run, out: Path, shard: Shard, main: Journal, fresh: bool, progress: Progress) -> Data | None:
    if shard.rank == 0:
        if fresh:
            clear(out)
        merge_journals(main.open())
    shard.barrier()
    if shard.rank:
        main.read()
    check_done(main, run.cells())
    todo = [(job, cell) for job, cell in run.cells() if cell.key not in main.done]
    alone = [pair for pair in todo if shard.world == 1 or pair[0].timed]
    shared = [pair for pair in todo if pair not in alone]
    session = Session(run.model, run.variants, run.dtype, run.device or shard.device, run.seed)
    if shard.world > 1:
        journal = shard.journal(out, run.arguments()).open()
        _work(run, shared[shard.rank :: shard.world], session, journal, progress)
        journal.close()  # for the first process to take over
        shard.barrier()
    if shard.rank == 0:
        merge_journals(main)
        _work(run, alone, session, main, progress)
    shard.leave()
    return write_results(run, main, out) if shard.rank == 0 else None


def clear(out: Path) -> None:
    """Forget the cells of an earlier run. Raises EvaluationError when one is going on."""
    for path in [out / JOURNAL, *shard_journals(out)]:
        Journal(path, {}).remove()


def _work(run: Run, cells: Cells, session: Session, journal: Journal, progress: Progress) -> None:
    if not cells:
        return
    for job, cell in cells:
        job.check(cell, session)
    with progress(run.title, run.steps(cells)) as step:
        session.step = step
        for job, cell in cells:
            start = time.perf_counter()
            result = job.run(cell, session)
            record = {"data": result.data, "samples": result.samples, "seconds": time.perf_counter() - start}
            journal.add(cell.key, {**record, "model": session.loaded.describe()})


def write_results(run: Run, journal: Journal, out: Path) -> Data:
    """results.json and samples.jsonl from the journal's cells, in the run's order."""
    results = collect(run, journal)
    lines = [journal.done[cell.key] for _, cell in run.cells()]
    write_jsonl(out / SAMPLES, (sample for line in lines for sample in line["samples"]))
    write_json(out / RESULTS, results)
    return results


def collect(run: Run, journal: Journal) -> Data:
    """The content of results.json."""
    jobs: list[dict[str, Any]] = []
    for job in run.jobs:
        cells = job.cells(run.variants)
        rows = job.rows({cell: journal.done[cell.key]["data"] for cell in cells})
        settings = job.settings()
        jobs.append({"label": job.label, "kind": job.kind, "settings": settings, "rows": rows, **job.more(rows)})
    first = next(iter(run.cells()), None)
    any_cell = journal.done[first[1].key] if first else {}
    return {
        "title": run.title,
        "about": run.about,
        "environment": environment(run.device),
        "model": any_cell.get("model"),
        "arguments": run.arguments(),
        "seed": run.seed,
        "variants": [v.to_dict() for v in run.variants],
        "jobs": jobs,
        "notes": list(run.notes),
        "seconds": sum(line["seconds"] for line in journal.done.values()),
    }
