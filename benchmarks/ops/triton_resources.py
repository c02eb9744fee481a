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

from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import BlockMap, Selection, SinkWindow
from hfpatch.methods.dhsa import fused
from hfpatch.methods.dhsa.boundaries import fixed
from hfpatch.methods.dhsa.choose import Rooms
from hfpatch.methods.dhsa.table import ChunkTable
from hfpatch.ops import triton_boundaries, triton_chunks, triton_executor, triton_kernels
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
CHOICES: dict[str, tuple[int, int, torch.dtype, str, dict[str, Any]]] = {
    # name: (keys, key dim, dtype, rule, extras)
    "choice by queries": (8192, 128, BF16, "queries", {}),
    "choice by queries of 128k": (131072, 128, BF16, "queries", {}),
    "choice by queries of 256k, 256 wide": (262000, 256, BF16, "queries", {}),
    "choice by queries soft-cap": (8192, 128, BF16, "queries", {"softcap": 30.0, "bias": torch.zeros(1, 1, 8192)}),
    "choice by queries float32": (8192, 128, FP32, "queries", {}),
    "choice by mass": (8192, 128, BF16, "mass", {}),
    "choice by mass 256 wide": (8192, 256, BF16, "mass", {}),
    "choice by mean": (8192, 128, BF16, "mean", {}),
    "choice by mean of 256k": (262000, 128, BF16, "mean", {}),
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
    attend, merge, order = (Counted(getattr(triton_kernels, f"{n}_kernel")) for n in ("attend", "merge", "order"))
    triton_kernels.attend_kernel, triton_kernels.merge_kernel, triton_kernels.order_kernel = attend, merge, order
    rng = random.Random(0)
    for length in (rng.randint(1100, 9000) for _ in range(40)):
        kv = torch.empty(1, 8, length, 128, dtype=BF16)
        for queries, blocks in ((length, "128x128"), (1, "1x16")):
            q = torch.empty(1, 32, queries, 128, dtype=BF16)
            for kind in (blocks, "window"):
                triton_executor.run(Problem(q, kv, kv, selection(kind, queries, length), 0.1))
    found = f"{len(attend.seen)} attention kernels, {len(merge.seen)} merge kernel, {len(order.seen)} list kernel"
    print(f"{found} for 40 lengths")
    return 0


def main() -> int:
    """Print a line per case."""
    triton.runtime.driver.set_active(Hopper())
    if sys.argv[1:] == ["--lengths"]:
        return lengths()
    triton_executor.split_count = lambda programs, tiles, device: 8 if programs < 100 else 1
    found: list[tuple[int, int, int]] = []
    for module in (triton_kernels, triton_chunks, triton_boundaries):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            setattr(module, name, Compiled(getattr(module, name), found))
    wrong = 0
    cases = {n: attend(c) for n, c in CASES.items()} | {n: choice(c) for n, c in CHOICES.items()}
    cases["boundaries of 128k"] = lambda: fused.suppress(torch.zeros(1, 131072), 4)
    for name, make in cases.items():
        if any(word not in name for word in sys.argv[1:]):
            continue
        found.clear()
        make()
        for registers, spilled, shared in found:
            print(f"{name:<34}{registers:4} registers  {spilled:6} bytes spilled  {shared:7} bytes shared", flush=True)
            wrong += spilled > SPILLED or shared > SHARED
    return int(wrong > 0)


def attend(case: tuple[int, int, int, torch.dtype, str, dict[str, Any]]) -> Callable[[], Any]:
    """What runs attention, and the merge of its parts in decode."""
    lq, d, dv, dtype, kind, extras = case
    lk = max(lq, 8192 if lq == 1 else 0)

    def run() -> Any:
        q, k, v = (torch.zeros(1, h, n, w, dtype=dtype) for h, n, w in ((32, lq, d), (8, lk, d), (8, lk, dv)))
        return triton_executor.run(Problem(q, k, v, selection(kind, lq, lk), d**-0.5, **extras))

    return run


def choice(case: tuple[int, int, torch.dtype, str, dict[str, Any]]) -> Callable[[], Any]:
    """What chooses chunks of 16 tokens in a decode step."""
    keys, d, dtype, rule, extras = case

    def run() -> Any:
        q, k = torch.zeros(1, 32, 1, d, dtype=dtype), torch.zeros(1, 8, 1, d, dtype=dtype).expand(-1, -1, keys, -1)
        call = AttentionCall(0, 1, "decode", q, k, k, d**-0.5, rows=(0,), **extras)
        table = ChunkTable.empty(k)
        table.close(keys - 20, lambda start, stop: fixed(1, start, stop, 16, k.device))
        table.grow(keys - 20, keys)
        table.moments = q.new_zeros(1, 8, 1, table.moments.shape[3]).expand(-1, -1, table.starts.shape[1] + 1, -1)
        table.measured = table.closed
        room = Rooms(64, 128, 1).of((keys - 1, keys), 1, 2048, keys, k.device)
        return fused.choose(fused.scores(call, table, room, rule, False), table, room)

    return run


if __name__ == "__main__":
    sys.exit(main())
