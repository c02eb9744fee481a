"""What the Triton kernels become on a Hopper GPU (sm_90), compiled here without one: registers, spills, shared memory.

PYTHONPATH=. python benchmarks/ops/triton_resources.py            # all cases; 10 to 60 s of compiling each
PYTHONPATH=. python benchmarks/ops/triton_resources.py decode     # those whose name contains a word
PYTHONPATH=. python benchmarks/ops/triton_resources.py --lengths  # how many kernels 40 lengths of prompts compile

Says nothing of speed. Exits with 1 when a kernel spills more than a few registers or wants more shared memory than
there is.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

from hfpatch.core.selection import BlockMap, Selection, SinkWindow
from hfpatch.ops import triton_executor, triton_kernels
from hfpatch.ops.call import Problem

SHARED = 227 * 1024
SPILLED = 128
BF16, FP32 = torch.bfloat16, torch.float32
CASES: dict[str, tuple[int, int, int, torch.dtype, str, dict[str, Any]]] = {
    # name: (queries, key dim, value dim, dtype, selection, extras)
    "prefill blocks": (2048, 128, 128, BF16, "128x128", {}),
    "prefill blocks 64 wide": (2048, 64, 64, BF16, "64x64", {}),
    "prefill blocks 96 wide": (2048, 96, 96, BF16, "128x128", {}),
    "prefill blocks 192 and 128 wide": (2048, 192, 128, BF16, "128x128", {}),
    "prefill blocks 256 wide": (2048, 256, 256, BF16, "128x128", {}),
    "prefill blocks soft-cap": (2048, 128, 128, BF16, "128x128", {"softcap": 30.0}),
    "prefill pages": (2048, 128, 128, BF16, "16x16", {}),
    "prefill window": (2048, 128, 128, BF16, "window", {}),
    "prefill window sinks": (2048, 128, 128, BF16, "window", {"sinks": torch.zeros(32)}),
    "prefill window 256 wide": (2048, 256, 256, BF16, "window", {}),
    "decode pages": (1, 128, 128, BF16, "1x16", {}),
    "decode tokens": (1, 128, 128, BF16, "1x1", {}),
    "decode window": (1, 128, 128, BF16, "window", {}),
    "prefill blocks float32": (2048, 128, 128, FP32, "128x128", {}),
}


class Hopper:
    """Stands in for the driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel: Any, found: list[tuple[int, int, int]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: Any, **kw: Any) -> None:
            made = self.kernel.warmup(*args, grid=grid, **kw)
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
                f.write(made.asm["ptx"])
                f.flush()
                ptxas = f"{triton.__path__[0]}/backends/nvidia/bin/ptxas"
                command = [ptxas, "-v", "-arch=sm_90a", f.name, "-o", os.devnull]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            numbers = [int(re.search(p, said)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
            self.found.append((numbers[0], numbers[1], made.metadata.shared))

        return compile_only


def selection(kind: str, queries: int, keys: int) -> Selection:
    """A selection of 1024 of the keys; only its shapes matter."""
    if kind == "window":
        return SinkWindow(4, 1020)
    block_q, block_k = map(int, kind.split("x"))
    indices = torch.arange(1024 // block_k).expand(1, 8, -(-queries // block_q), -1)
    return BlockMap(indices, torch.full(indices.shape[:3], indices.shape[3]), block_q, block_k)


class Counted:
    """A kernel that notes what it would be compiled for instead of being launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.seen = kernel, set[Any]()
        kernel._do_compile = lambda key, *_, **__: self.seen.add(key)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **words: self.kernel.warmup(*args, grid=grid, **words)


def lengths() -> int:
    """Print how many kernels 40 prompts of different lengths need, prefill and decode."""
    attend, merge = Counted(triton_kernels.attend_kernel), Counted(triton_kernels.merge_kernel)
    triton_kernels.attend_kernel, triton_kernels.merge_kernel = attend, merge
    rng = random.Random(0)
    for length in (rng.randint(1100, 9000) for _ in range(40)):
        kv = torch.empty(1, 8, length, 128, dtype=BF16)
        for queries, blocks in ((length, "128x128"), (1, "1x16")):
            q = torch.empty(1, 32, queries, 128, dtype=BF16)
            for kind in (blocks, "window"):
                triton_executor.run(Problem(q, kv, kv, selection(kind, queries, length), 0.1))
    print(f"{len(attend.seen)} attention kernels and {len(merge.seen)} merge kernels for 40 lengths")
    return 0


def main() -> int:
    """Print a line per case."""
    triton.runtime.driver.set_active(Hopper())
    if sys.argv[1:] == ["--lengths"]:
        return lengths()
    triton_executor.split_count = lambda programs, tiles, device: 8 if programs < 100 else 1
    found: list[tuple[int, int, int]] = []
    for name in ("attend_kernel", "merge_kernel"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name), found))
    wrong = 0
    for name, (lq, d, dv, dtype, kind, extras) in CASES.items():
        if any(word not in name for word in sys.argv[1:]):
            continue
        lk = max(lq, 8192 if lq == 1 else 0)
        q, k, v = (torch.zeros(1, h, n, w, dtype=dtype) for h, n, w in ((32, lq, d), (8, lk, d), (8, lk, dv)))
        found.clear()
        triton_executor.run(Problem(q, k, v, selection(kind, lq, lk), d**-0.5, **extras))
        for registers, spilled, shared in found:
            print(f"{name:<34}{registers:4} registers  {spilled:6} bytes spilled  {shared:7} bytes shared", flush=True)
            wrong += spilled > SPILLED or shared > SHARED
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
