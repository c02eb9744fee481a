"""Peak memory above the loaded model: the allocator's on CUDA, a fresh child process' resident set on a CPU."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfpatch import PatchConfig

from ..errors import EvaluationError
from ..run.cells import Cell, CellResult, Data, Session, Work
from ..run.generation import generate_tokens, text_ids
from ..run.models import Loaded, check_positions, load_model, pick_device
from ..run.peak import GIVE_BACK, PeakReader, peak_reader, trim
from ..run.stats import GIB, memory_text, tokens
from ..run.timing import Stopwatch
from ..run.variants import Variant
from .base import COUNT, LENGTHS, NUMBER, POSITIVE, TEXT, Job, keys, setting
from .registry import register_job
from .view import (
    BYTES,
    Answer,
    Aspect,
    Lines,
    Number,
    Panel,
    Row,
    Series,
    Table,
    TableCell,
    View,
    heading,
    names_of,
    new_lengths,
    of_variant,
    ratio,
    tone,
)

WARMUP = 4096  # tokens of the call before the measured one, in which patches act, so that their code is loaded
ASPECT = Aspect(
    "memory", "Memory: peak on top of the loaded model, relative to dense.", ratio,
    lambda own, dense, clear: f"needs {own:.2f} times the memory on top of the model",
    "need less memory on top of the model", more_is_better=False, longest=True,
)  # fmt: skip


@register_job
@dataclass(frozen=True)
class MemoryJob(Job):
    """Settings of a memory measurement: prompt lengths and decoded tokens."""

    kind = "memory"
    about = "Peak memory above the loaded model."
    group = "measure"
    timed = True
    row = keys(
        variant=TEXT, length=POSITIVE, peak=NUMBER, peak_prefill=NUMBER, peak_decode=NUMBER, ratio=NUMBER, how=TEXT
    )

    lengths: Sequence[int] = setting(LENGTHS)
    decode_tokens: int = setting(COUNT, 8)
    label: str = "memory"

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """One prompt, on a CPU in a process of its own."""
        return Work(1, self.decode_tokens, own_process=True)

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Peak bytes of prefill and of decoding, above the memory in use before the call."""
        variant = session.variant(cell.variant)
        if pick_device(session.device).startswith("cuda"):
            data = _measure(session.loaded, variant, cell.length, self.decode_tokens, session.seed)
        else:
            data = _in_child(session, variant, cell.length, self.decode_tokens)
        if variant.config is None and data["peak"] <= 0:
            raise EvaluationError(f"At {cell.length} tokens too little memory is used to be measured; ask for more.")
        session.step()
        return CellResult({**data, "question_in_sparse_part": variant.question_in_sparse_part})

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per length and variant, with the ratio to dense."""
        dense = {c.length: d["peak"] for c, d in done.items() if c.variant == "dense"}
        return [
            {"variant": c.variant, "length": c.length, **d, "ratio": d["peak"] / dense[c.length]}
            for c, d in done.items()
        ]

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Peaks in prefill and decoding, and the ratio to dense."""
        rows = sorted(entry["rows"], key=lambda r: r["length"])
        body = [
            [
                r["variant"], tokens(r["length"]), memory_text(r["peak_prefill"]), memory_text(r["peak_decode"]),
                TableCell(ratio(r["ratio"]), tone=tone(r["ratio"], more_is_better=False)),
            ]
            for r in rows
        ]  # fmt: skip
        header = ["variant", "prompt", "prefill", "decoding", "/ dense"]
        return View(
            heading("Peak memory", entry),
            "The most memory in use above the loaded model while the prompt was read and while tokens were decoded; "
            "the key-value cache is part of it.",
            Table("peak above the loaded model", header, body, new_lengths(rows)), _plot(rows),
            [Number("peak", r["variant"], tokens(r["length"]), float(r["peak"]), BYTES) for r in rows],
            [f"Measured by: {rows[0]['how']}."],
            [Answer(ASPECT, r["variant"], float(r["ratio"]), r["length"]) for r in rows],
        )  # fmt: skip


def _plot(rows: Sequence[Row]) -> Lines:
    unit, name = (GIB, "GiB") if max(r["peak"] for r in rows) > GIB else (2**20, "MiB")
    panels = []
    for key, title in (("peak_prefill", "peak in prefill"), ("peak_decode", "peak in decoding")):
        own = {n: of_variant(rows, n) for n in names_of(rows)}
        lines = [Series(n, [r["length"] for r in rs], [r[key] / unit for r in rs]) for n, rs in own.items()]
        panels.append(Panel(lines, f"above the loaded model ({name})", title, from_zero=True))
    return Lines(panels)


class _PhasePeaks(Stopwatch):
    """Splits the peak at the first token."""

    def __init__(self, reader: PeakReader) -> None:
        super().__init__()
        self.reader, self.prefill = reader, 0

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.times) == 2:
            self.prefill = self.reader.peak()
            self.reader.reset()


def _measure(loaded: Loaded, variant: Variant, length: int, decode_tokens: int, seed: int) -> Data:
    check_positions(loaded.model, length, decode_tokens + 1, loaded.name)
    reader = peak_reader(loaded.device)
    ids = text_ids(loaded, length, seed)
    with variant.applied(loaded.model):
        generate_tokens(loaded, ids[:, :WARMUP], 2)
        trim()
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        reader.reset()
        start, watch = reader.now(), _PhasePeaks(reader)
        generate_tokens(loaded, ids, decode_tokens + 1, watch)
        decode = reader.peak()
    peaks = {"peak_prefill": watch.prefill - start, "peak_decode": decode - start}
    return {**peaks, "peak": max(peaks.values()), "baseline": start, "how": reader.how}


def _in_child(session: Session, variant: Variant, length: int, decode_tokens: int) -> Data:
    with tempfile.TemporaryDirectory() as folder:
        if variant.config is not None:
            variant.config.save_pretrained(folder)
        job = {
            "model": session.model_name, "dtype": session.dtype, "device": session.device, "seed": session.seed,
            "patch": folder if variant.config else None, "name": variant.name, "length": length,
            "decode_tokens": decode_tokens, "threads": torch.get_num_threads(),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "hfpatch.evals.jobs.memory"], input=json.dumps(job), capture_output=True, text=True,
            env={**GIVE_BACK, **os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )  # fmt: skip
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1] or f"exit code {done.returncode}"
        raise EvaluationError(f"Memory of {variant.name} at {length} tokens could not be measured: {reason}")
    measured: Data = json.loads(done.stdout.strip().split("\n")[-1])
    return measured


def _child(job: Mapping[str, Any]) -> Data:
    torch.set_num_threads(job["threads"])
    config = PatchConfig.from_pretrained(job["patch"]) if job["patch"] else None
    loaded = load_model(job["model"], job["dtype"], job["device"])
    return _measure(loaded, Variant(job["name"], config), job["length"], job["decode_tokens"], job["seed"])


if __name__ == "__main__":
    print(json.dumps(_child(json.load(sys.stdin))))
