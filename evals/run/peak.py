"""High-water marks of memory: the allocator's on CUDA, the resident set's on a CPU."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import EvaluationError

# Freed tensors and the scratch of matrix products leave the resident set: it counts what is alive, as on a GPU.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MKL_DISABLE_FAST_MM": "1"}


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
