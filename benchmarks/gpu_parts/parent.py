"""Runs the parts one after the other in processes of their own, and keeps every row that comes."""

import contextlib
import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from gpu_parts.child import serve
from gpu_parts.plan import FAILED, MISSING, OK, PARTS, ROOT, WRONG, Options, Row

MOST_RESTARTS = 200
STARTING = 60.0  # seconds until a process has imported everything and the card answers
PRELOADED = ["torch", "triton", "transformers.models.llama.modeling_llama", "hfpatch.public", "hfpatch.ops"]


class Lane:
    """The processes that work on every n-th group of a part, one after the other."""

    def __init__(self, run: "Run", part: int, lane: int, lanes: int, deadline: float) -> None:
        self.run, self.part, self.lane, self.lanes, self.deadline = run, part, lane, lanes, deadline
        self.cases: list[str] | None = None
        self.done: dict[str, str] = {}
        self.current: Row | None = None
        self.restarts, self.over = 0, False
        self.start()

    def start(self) -> None:
        """A new process, for what is not done yet."""
        self.pipe, there = self.run.context.Pipe(duplex=False)
        options = Options(**self.run.options, failed=frozenset(self.run.failed), done=frozenset(self.done))
        args = (there, self.part, self.lane, self.lanes, options)
        self.process = self.run.context.Process(target=self.run.serve, args=args)
        self.process.start()
        there.close()
        self.since = time.monotonic()

    @property
    def patience(self) -> float:
        """When the process is given up."""
        limit = STARTING if self.current is None else self.current["limit"] or self.run.case_limit
        return min(self.deadline, self.since + limit)

    def hear(self) -> None:
        """Take in one message, or the end of the process."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            return self.died()
        if "row" in said:
            self.take({"part": self.part, "case": self._name(), **said["row"]})
        elif "begin" in said:
            self.current, self.since = said, time.monotonic()
        elif "end" in said:
            self.done.setdefault(said["end"], OK)
            self.current, self.since = None, time.monotonic()
        elif "cases" in said:
            self.cases = said["cases"]
        elif "ready" in said:
            self.run.card = said["ready"]
        elif "broken" in said:
            self.give_up(said["broken"])

    def take(self, row: Row) -> None:
        """A row of the case at work."""
        if row["status"] in (FAILED, WRONG):
            self.done[row["case"]] = row["status"]
            if self.part == 1 and self.current is not None and self.current["family"]:
                self.run.failed.add(self.current["family"])
        self.run.keep(row)

    def died(self, why: str | None = None) -> None:
        """The process is gone: a row says so, and another one goes on behind the case that it died of."""
        kill(self.process)
        self.pipe.close()
        if self.cases is not None and all(name in self.done for name in self.cases):
            self.over = True
            return
        code = self.process.exitcode
        if self.current is not None:
            how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
            self._lost(why or f"the process died ({how})")
        elif not self.done or self.restarts > MOST_RESTARTS:
            return self.give_up(why or f"the process died between cases (status {code})")
        self.current = None
        self.restarts += 1
        self.start()

    def late(self) -> None:
        """The process, or the part, has had its time."""
        if time.monotonic() >= self.deadline:
            kill(self.process)
            self.over = True
        elif self.current is None:
            self.give_up(f"no process was ready within {STARTING:.0f} s")
        else:
            self.died(f"no end in {self.current['limit'] or self.run.case_limit:.0f} s, killed")

    def _lost(self, why: str) -> None:
        self.take({"part": self.part, "case": self._name(), "status": FAILED, "why": why})

    def give_up(self, why: str) -> None:
        """End the lane."""
        kill(self.process)
        self.over = True
        self.run.keep({"part": self.part, "case": f"lane {self.lane}", "status": FAILED, "why": why})

    def missing(self) -> list[str]:
        """Cases that nobody came to."""
        return ["all"] if self.cases is None else [name for name in self.cases if name not in self.done]

    def _name(self) -> str:
        return self.current["begin"] if self.current else f"lane {self.lane}"


class Run:
    """One run of the script: rows, what part 1 found wrong, and how the time is shared out.

    Processes are forked from one that has imported everything and not touched the card; where the card then does not
    answer, each begins anew.
    """

    def __init__(
        self,
        folder: Path,
        budget: float,
        case_limit: float,
        options: dict[str, Any],
        starts: tuple[str, ...] = ("forkserver", "spawn"),
        serve: Callable[..., None] = serve,
    ) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look for the card that leaves fork possible
        self.folder, self.case_limit, self.budget = folder, case_limit, budget
        self.options = {"log": str(folder / "gpu.log"), **options}
        self.rows: list[Row] = []
        self.parts: dict[int, Row] = {}
        self.failed: set[str] = set()
        self.card = "?"
        self.lanes: list[Lane] = []
        self.began = time.monotonic()
        self.starts, self.serve = starts, serve

    def start(self, how: str) -> str | None:
        """Begin processes that way, and see whether the card answers one: None, or why not."""
        self.context = mp.get_context(how)
        if how == "forkserver":
            self.context.set_forkserver_preload(PRELOADED)
        pipe, there = self.context.Pipe(duplex=False)
        process = self.context.Process(target=self.serve, args=(there, None, 0, 1, Options(**self.options)))
        process.start()
        there.close()
        why = f"the card has not answered in {STARTING:.0f} s"
        try:
            if pipe.poll(min(STARTING, max(1.0, self.left()))):
                said = pipe.recv()
                why = said.get("broken")
                self.card = said.get("ready", self.card)
        except EOFError:
            why = "the process died before the card answered"
        finally:
            kill(process)
        return why

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.monotonic() - self.began)

    def keep(self, row: Row) -> None:
        """Print a row and append it to the file."""
        row = {**row, "card": self.card, "at_s": round(time.monotonic() - self.began, 2)}
        self.rows.append(row)
        text = json.dumps(row)
        print(text, flush=True)
        with open(self.folder / "gpu.jsonl", "a", encoding="utf-8") as f:
            f.write(text + "\n")

    def run(self, wanted: list[int], after: Callable[["Run"], None]) -> None:
        """The parts, each with its share of what is left; `after` is called behind each."""
        try:
            for how in self.starts:
                if (why := self.start(how)) is None:
                    break
                self.keep({"part": None, "case": f"start by {how}", "status": FAILED, "why": why})
            else:
                return
            for n, part in enumerate(wanted):
                later = sum(PARTS[p].limit for p in wanted[n:])
                self.part(part, max(0.0, self.left()) * PARTS[part].limit / later)
                after(self)
        finally:
            for lane in self.lanes:
                kill(lane.process)
            after(self)

    def part(self, part: int, seconds: float) -> None:
        """One part, within so many seconds."""
        began = time.monotonic()
        if seconds < 1:
            return self._note(part, seconds, began, ["all"], "the budget was used up")
        lanes = 1 if self.options["dry"] else PARTS[part].lanes
        self.lanes = [Lane(self, part, n, lanes, began + seconds) for n in range(lanes)]
        while busy := [lane for lane in self.lanes if not lane.over]:
            until = min(lane.patience for lane in busy)
            heard: list[Connection] = wait([lane.pipe for lane in busy], max(0.0, until - time.monotonic()))  # type: ignore[assignment]
            for lane in busy:
                if lane.pipe in heard:
                    lane.hear()
                elif time.monotonic() >= lane.patience:
                    lane.late()
        working = [lane.current["begin"] for lane in self.lanes if lane.current and lane.missing()]
        why = "the part's time was over" + (f" (at work: {', '.join(working)})" if working else "")
        self._note(part, seconds, began, [name for lane in self.lanes for name in lane.missing()], why)

    def _note(self, part: int, seconds: float, began: float, missing: list[str], why: str) -> None:
        took = time.monotonic() - began
        done = sum(len(lane.done) for lane in self.lanes)
        self.parts[part] = {"limit_s": round(seconds, 1), "took_s": round(took, 1), "cases": done, "missing": missing}
        self.lanes = []
        if missing:
            self.parts[part]["why"] = why
            self.keep(
                {"part": part, "case": f"{len(missing)} cases", "status": MISSING, "why": why, "missing": missing}
            )


def kill(process: Any) -> None:
    """End a process and those that it started."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():
            process.kill()
        process.join(10)
