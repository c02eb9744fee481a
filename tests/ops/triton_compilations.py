"""Prints how many kernels 40 prompts of different lengths compile, prefill and decode; nothing is compiled or run."""

import os
import random
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hfpatch.core.selection import BlockMap, Selection, SinkWindow
from hfpatch.ops import triton_executor, triton_kernels
from hfpatch.ops.call import Problem


class NoGpu:
    """Stands in for the driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Counted:
    """A kernel that notes what it would be compiled for instead of being launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.seen = kernel, set[Any]()
        kernel._do_compile = lambda key, *_, **__: self.seen.add(key)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **words: self.kernel.warmup(*args, grid=grid, **words)


def blocks(queries: int, keys: int, size: int) -> Selection:
    """1024 keys in blocks, for every block of queries."""
    indices = torch.arange(1024 // size).expand(1, 8, -(-queries // size), -1)
    return BlockMap(indices, torch.full(indices.shape[:3], indices.shape[3]), size, size)


def main() -> None:
    """Count."""
    driver.set_active(NoGpu())
    attend, merge = Counted(triton_kernels.attend_kernel), Counted(triton_kernels.merge_kernel)
    triton_kernels.attend_kernel, triton_kernels.merge_kernel = attend, merge
    rng = random.Random(0)
    for length in (rng.randint(1100, 9000) for _ in range(40)):
        kv = torch.empty(1, 8, length, 128, dtype=torch.bfloat16)
        for queries, size in ((length, 128), (1, 16)):
            q = torch.empty(1, 32, queries, 128, dtype=torch.bfloat16)
            for selection in (blocks(queries, length, size), SinkWindow(4, 1000)):
                problem = Problem(q, kv, kv, selection, 0.1)
                triton_executor._launch(problem, triton_executor.Output.of(problem))
    print(len(attend.seen), len(merge.seen))


main()
