"""What the Triton kernels become on GPUs that are not here: registers, spills, shared memory, from their machine code.

PYTHONPATH=. python benchmarks/ops/triton_resources.py            # all cases on sm_80, sm_90, sm_100: half an hour
PYTHONPATH=. python benchmarks/ops/triton_resources.py --arch 90 --dtype float16 --only decode   # some of them
PYTHONPATH=. python benchmarks/ops/triton_resources.py --table    # as a table; quick once Triton's cache has them
PYTHONPATH=. python benchmarks/ops/triton_resources.py --lengths  # how many kernels 40 lengths of prompts compile

Says nothing of speed. Exits with 1 when a kernel spills in half precision, spills more than a little in float32, or
wants more shared memory than there is.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import BlockMap, Selection, SinkWindow
from hfpatch.methods.dhsa import fused
from hfpatch.methods.dhsa.boundaries import fixed
from hfpatch.methods.dhsa.choose import Rooms
from hfpatch.methods.dhsa.table import ChunkTable
from hfpatch.ops import triton_boundaries, triton_chunks, triton_executor, triton_kernels
from hfpatch.ops.call import Problem

KIB = 1024
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
SPILLED = {"bfloat16": 0, "float16": 0, "float32": 128}
WIDE = 128  # bytes that lists of 16,384 chunks may spill: a thousand threads have 64 registers each
CASES: dict[str, tuple[int, int, int, str, dict[str, Any]]] = {
    # name: (queries, key dim, value dim, selection, extras)
    "prefill blocks D64": (2048, 64, 64, "64x64", {}),
    "prefill blocks D96": (2048, 96, 96, "128x128", {}),
    "prefill blocks D128": (2048, 128, 128, "128x128", {}),
    "prefill blocks D192/128": (2048, 192, 128, "128x128", {}),
    "prefill blocks D256": (2048, 256, 256, "128x128", {}),
    "prefill blocks D128 soft-cap": (2048, 128, 128, "128x128", {"softcap": 30.0}),
    "prefill blocks D128 bias": (2048, 128, 128, "128x128", {"bias": torch.zeros(1, 1, 2048)}),
    "prefill blocks D256 both": (2048, 256, 256, "128x128", {"softcap": 30.0, "bias": torch.zeros(1, 1, 2048)}),
    "prefill pages D128": (2048, 128, 128, "16x16", {}),
    "prefill tokens D128": (2048, 128, 128, "16x1", {}),
    "prefill window D128": (2048, 128, 128, "window", {}),
    "prefill window D128 sinks": (2048, 128, 128, "window", {"sinks": torch.zeros(32)}),
    "prefill window D256": (2048, 256, 256, "window", {}),
    "decode pages D64": (1, 64, 64, "1x16", {}),
    "decode pages D128": (1, 128, 128, "1x16", {}),
    "decode pages D256": (1, 256, 256, "1x16", {}),
    "decode tokens D128": (1, 128, 128, "1x1", {}),
    "decode window D128": (1, 128, 128, "window", {}),
    "decode window D256": (1, 256, 256, "window", {}),
}  # fmt: skip
CHOICES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    # name: (keys, key dim, dhsa's rule, extras)
    "choice by queries": (8192, 128, "queries", {}),
    "choice by queries of 128k": (131072, 128, "queries", {}),
    "choice by queries of 256k, D256": (262000, 256, "queries", {}),
    "choice by queries soft-cap": (8192, 128, "queries", {"softcap": 30.0, "bias": torch.zeros(1, 1, 8192)}),
    "choice by mass": (8192, 128, "mass", {}),
    "choice by mass D256": (8192, 256, "mass", {}),
    "choice by mean": (8192, 128, "mean", {}),
    "choice by mean of 256k": (262000, 128, "mean", {}),
}
KERNELS = (triton_kernels, triton_chunks, triton_boundaries)


class Card:
    """Stands in for the driver of a GPU that is not there; each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Compiled:
    """A kernel that is compiled instead of launched; `found` takes registers, spilled and shared bytes."""

    def __init__(self, kernel: Any, found: list[tuple[int, int, int]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: Any, **kw: Any) -> None:
            made = self.kernel.warmup(*args, grid=grid, **kw)
            said = asked(f"{triton.__path__[0]}/backends/nvidia/bin/cuobjdump", "-res-usage", made.asm["cubin"])
            registers, stack = (int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))
            self.found.append((registers, spilled(made.asm["ptx"]) if stack else 0, made.metadata.shared))

        return compile_only


def spilled(ptx: str) -> int:
    """Bytes that the assembler says it spills; a stack may hold other things."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    tool = get_ptxas(int(re.search(r"\d+", target)[0])).path
    said = asked(tool, f"-arch={target}", "-v", ptx.encode(), "-o", os.devnull)
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


def asked(*command: str | bytes) -> str:
    """What a tool says; bytes are a file for it."""
    with tempfile.NamedTemporaryFile() as f:
        f.write(next(word for word in command if isinstance(word, bytes)))
        f.flush()
        words = [f.name if isinstance(word, bytes) else word for word in command]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


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
        kv = torch.empty(1, 8, length, 128, dtype=torch.bfloat16)
        for queries, blocks in ((length, "128x128"), (1, "1x16")):
            q = torch.empty(1, 32, queries, 128, dtype=torch.bfloat16)
            for kind in (blocks, "window"):
                triton_executor.run(Problem(q, kv, kv, selection(kind, queries, length), 0.1))
    found = f"{len(attend.seen)} attention kernels, {len(merge.seen)} merge kernel, {len(order.seen)} list kernel"
    print(f"{found} for 40 lengths")
    return 0


def attend(lq: int, d: int, dv: int, kind: str, extras: dict[str, Any], dtype: torch.dtype) -> None:
    """Attention, and the merge of its parts in decode."""
    lk = max(lq, 8192 if lq == 1 else 0)
    q, k, v = (torch.zeros(1, h, n, w, dtype=dtype) for h, n, w in ((32, lq, d), (8, lk, d), (8, lk, dv)))
    triton_executor.run(Problem(q, k, v, selection(kind, lq, lk), d**-0.5, **extras))


def choose(keys: int, d: int, rule: str, extras: dict[str, Any], dtype: torch.dtype) -> None:
    """The choice of chunks of 16 tokens in a decode step of dhsa."""
    q, k = torch.zeros(1, 32, 1, d, dtype=dtype), torch.zeros(1, 8, 1, d, dtype=dtype).expand(-1, -1, keys, -1)
    call = AttentionCall(0, 1, "decode", q, k, k, d**-0.5, rows=(0,), **extras)
    table = ChunkTable.empty(k)
    table.close(keys - 20, lambda start, stop: fixed(1, start, stop, 16, k.device))
    table.grow(keys - 20, keys)
    table.moments = q.new_zeros(1, 8, 1, table.moments.shape[3]).expand(-1, -1, table.starts.shape[1] + 1, -1)
    table.measured = table.closed
    room = Rooms(64, 128, 1).of((keys - 1, keys), 1, 2048, keys, k.device)
    fused.choose(fused.scores(call, table, room, rule, False), table, room)


def suppress(dtype: torch.dtype) -> None:
    """Which of many boundaries stay; scores are float32."""
    fused.suppress(torch.zeros(1, 131072), 4)


def cases() -> dict[str, Callable[[torch.dtype], None]]:
    """What to run in each dtype, by name."""
    return {
        **{name: partial(attend, *case) for name, case in CASES.items()},
        **{name: partial(choose, *case) for name, case in CHOICES.items()},
        "boundaries of 128k": suppress,
    }


def kernels() -> Iterator[tuple[Any, str]]:
    """Modules and the names of their kernels."""
    yield from ((module, name) for module in KERNELS for name in sorted(vars(module)) if name.endswith("_kernel"))


def measured(arch: int, dtypes: list[str], only: str) -> Iterator[tuple[str, str, list[tuple[int, int, int]]]]:
    """Case, dtype and `(registers, spilled, shared)` of each of its kernels, compiled for the architecture."""
    triton.runtime.driver.set_active(Card(arch))
    triton_executor.generation = lambda device: arch // 10
    for name, run in cases().items():
        for dtype in dtypes if only in name else []:
            FOUND.clear()
            run(getattr(torch, dtype))
            yield name, dtype, sorted(FOUND, key=lambda found: (found[1], found[0]), reverse=True)


def table(rows: dict[tuple[str, str], dict[int, tuple[int, int, int]]], archs: list[int]) -> str:
    """Markdown: a row per case and dtype, of each architecture registers / spilled bytes / KiB shared."""
    head = ["kernel", "dtype", *(f"sm_{arch}" for arch in archs)]
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for (name, dtype), by_arch in rows.items():
        cells = (by_arch[arch] for arch in archs)
        lines.append(" | ".join([name, dtype, *(f"{r} / {s} / {m / KIB:.0f}" for r, s, m in cells)]))
    return "\n".join(f"| {line} |" for line in lines)


FOUND: list[tuple[int, int, int]] = []


def main() -> int:
    """Print a line per kernel, or the table, which has of each case the kernel that spills or needs most."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=SHARED, default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", choices=SPILLED, default=list(SPILLED))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--table", action="store_true", help="print a Markdown table at the end")
    parser.add_argument("--lengths", action="store_true", help="count kernels for prompts of many lengths instead")
    args = parser.parse_args()
    if args.lengths:
        triton.runtime.driver.set_active(Card(90))
        return lengths()
    triton_executor.split_count = lambda programs, tiles, device: 8 if programs < 100 else 1
    for module, name in list(kernels()):
        setattr(module, name, Compiled(getattr(module, name), FOUND))
    rows: dict[tuple[str, str], dict[int, tuple[int, int, int]]] = {}
    wrong = 0
    for arch in args.arch:
        for name, dtype, found in measured(arch, args.dtype, args.only):
            rows.setdefault((name, dtype), {})[arch] = found[0]
            for n, (registers, spilled, shared) in enumerate(found):
                bad = spilled > (WIDE if "256k" in name else SPILLED[dtype]) or shared > SHARED[arch]
                wrong += bad
                what = f"sm_{arch} {name}{', another' * (n > 0)} {dtype}"
                print(
                    f"{what:<58}{registers:4} registers {spilled:5} spilled {shared:7} shared{' !' * bad}",
                    file=sys.stderr if args.table else sys.stdout, flush=True,
                )  # fmt: skip
    if args.table:
        print(f"Triton {triton.__version__}\n\n{table(rows, args.arch)}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
