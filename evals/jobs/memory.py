"""Peak memory above the loaded model: the allocator's on CUDA, a fresh child process' resident set on a CPU."""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfpatch import PatchConfig

from ..errors import EvaluationError
from ..run.cells import Cell, CellResult, Data, Session
from ..run.generation import generate_tokens, text_ids
from ..run.models import Loaded, check_positions, load_model, pick_device
from ..run.variants import Variant
from .latency import Stopwatch

WARMUP = 4096  # tokens of the call before the measured one, in which patches act, so that their code is loaded
# Freed tensors and the scratch of matrix products leave the resident set: it counts what is alive, as on a GPU.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MKL_DISABLE_FAST_MM": "1"}


@dataclass(frozen=True)
class MemoryJob:
    """Settings of a memory measurement: prompt lengths and decoded tokens."""

    lengths: Sequence[int]
    decode_tokens: int = 8
    label: str = "memory"
    kind: str = "memory"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per length and variant."""
        return [Cell(self.label, v.name, n) for n in sorted(self.lengths) for v in variants]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """One measurement."""
        return 1

    def work(self, cell: Cell, variants: Sequence[Variant]) -> tuple[int, int, int] | None:
        """Prompts, new tokens for each, and prompts at a time."""
        return 1, self.decode_tokens, 1

    def settings(self) -> Data:
        """Arguments as plain data."""
        return {"lengths": list(self.lengths), "decode_tokens": self.decode_tokens}

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


class PeakReader:
    """Reads and resets a high-water mark of memory, in bytes."""

    def __init__(self, how: str, peak: Callable[[], int], now: Callable[[], int], reset: Callable[[], None]) -> None:
        self.how, self.peak, self.now, self.reset = how, peak, now, reset


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise EvaluationError(f"/proc/self/status has no {field}; memory cannot be measured on this system.")


def trim() -> None:
    """Give freed memory back to the system, where it can be told to."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _clear_refs() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _rusage_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_reader(device: torch.device) -> PeakReader:
    """How peak memory is read on this device."""
    if device.type == "cuda":
        return PeakReader(
            "CUDA allocator, peak allocated", lambda: torch.cuda.max_memory_allocated(device),
            lambda: torch.cuda.memory_allocated(device), lambda: torch.cuda.reset_peak_memory_stats(device),
        )  # fmt: skip
    try:
        _clear_refs()
        _status("VmHWM")
    except OSError:
        return PeakReader("child process, ru_maxrss", _rusage_peak, _rusage_peak, lambda: None)
    return PeakReader("child process, VmHWM", lambda: _status("VmHWM"), lambda: _status("VmRSS"), _clear_refs)


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
