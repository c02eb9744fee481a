"""The card behind a few calls; in a dry run this machine's CPU behind the same ones."""

import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from gpu_parts.plan import first_line

FLUSHED = 256 << 20
Row = dict[str, Any]


class Device:
    """Clock, memory and waits of the card; of the CPU in a dry run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.torch = torch.device("cpu" if dry else "cuda")
        if not dry:
            torch.cuda.init()
        self.card = "dry run on a CPU" if dry else torch.cuda.get_device_name()
        self._flushed: torch.Tensor | None = None

    def wait(self) -> None:
        """Wait until the card has done all it was given."""
        if not self.dry:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any], flush: bool = True) -> tuple[float, Any]:
        """Milliseconds and result of a call whose inputs are not in the card's cache."""
        if self.dry:
            start = time.perf_counter()
            result = call()
            return 1e3 * (time.perf_counter() - start), result
        if flush:
            self._flush()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop), result

    def times(
        self, calls: dict[str, Callable[[], Any]], seconds: float = 1.5, least: int = 3, most: int = 20
    ) -> dict[str, Row]:
        """Median, least and most milliseconds of each call, taken in turns after a warm-up."""
        if self.dry:
            least = most = 1
        whole = sum(self._warm(call) for call in calls.values()) / 1e3
        repeats = max(least, min(most, int(seconds / max(whole, 1e-6))))
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                found[name].append(self.timed(call)[0])
        return {name: spread(ms) for name, ms in found.items()}

    def replay(self, call: Callable[[], Any]) -> tuple[Callable[[], Any] | None, str]:
        """The call as a CUDA graph, or why it is none; in a dry run the call itself."""
        call()
        if self.dry:
            return call, ""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as e:
            return None, first_line(e)
        return graph.replay, ""

    def peak(self, call: Callable[[], Any]) -> float | None:
        """MiB that a call needs at its peak beyond what was there before; None in a dry run."""
        if self.dry:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Count, by line, how often the CPU waits for the card inside the block."""
        found: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if not self.dry:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                if not self.dry:
                    torch.cuda.set_sync_debug_mode("default")
                found.update(place(w) for w in seen if "synchronizing CUDA operation" in str(w.message))

    def _flush(self) -> None:
        if self._flushed is None:
            self._flushed = torch.empty(FLUSHED, dtype=torch.int8, device=self.torch)
        self._flushed.zero_()

    def _warm(self, call: Callable[[], Any]) -> float:
        if self.dry:
            return 0.0
        call()
        return self.timed(call)[0]


def is_card_trouble(error: BaseException) -> bool:
    """Whether the card answers everything with errors from now on, until the process ends."""
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


def spread(ms: list[float]) -> Row:
    """Median, least, most and number of repeats."""
    return {"ms": statistics.median(ms), "low": min(ms), "high": max(ms), "repeats": len(ms)}


def place(warning: warnings.WarningMessage) -> str:
    """File and line of a warning, from the package's folder on."""
    parts = warning.filename.split(os.sep)
    start = max((n for n, name in enumerate(parts) if name in ("hfpatch", "transformers", "torch")), default=0)
    return f"{'/'.join(parts[start:])}:{warning.lineno}"


def versions() -> Row:
    """What this process runs on."""
    found: Row = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "transformers", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
