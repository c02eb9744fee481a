"""Part 0: what the card is and does, while other processes compile Triton's variants."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from gpu_parts import kernels, tiles
from gpu_parts.context import Context
from gpu_parts.device import spread, versions
from gpu_parts.exact import run
from gpu_parts.plan import OK, PARTS, SKIPPED, Case, Row
from gpu_parts.problems import LONG, specs
from gpu_parts.right import executors


def cases(context: Context) -> list[Case]:
    """The card's own cases in group 0; each variant of Triton's kernels in one of the others."""
    found = [Case(f.__name__.strip("_"), partial(f, context)) for f in (_versions, _copy, _product)]
    others = PARTS[0].lanes - 1
    jobs = kernels.variants(context)
    jobs += [(spec.name, partial(_make, context, spec)) for spec in specs(context) if spec.lk < LONG]
    jobs += tiles.variants(context)
    if context.dry:
        jobs = [*jobs[:4], *jobs[-2:]]
    return found + [
        Case(f"compile {name}", partial(_compile, make), group=1 + n % others) for n, (name, make) in enumerate(jobs)
    ]


def _make(context: Context, spec: Any) -> Any:
    return partial(run, spec.make(context.device.torch), "triton")


def _versions(context: Context) -> Iterator[Row]:
    row: Row = {"status": OK, **versions(), "executors": executors()}
    if not context.dry:
        about = torch.cuda.get_device_properties(0)
        row |= {"processors": about.multi_processor_count, "capability": [about.major, about.minor]}
        row["memory_gb"] = round(about.total_memory / 1e9, 1)
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        row["driver"] = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    yield row


def _copy(context: Context) -> Iterator[Row]:
    """4 GB read and as many written."""
    size = 1 << 20 if context.dry else 4 * 10**9
    there = torch.empty(size, dtype=torch.uint8, device=context.device.torch).random_()
    here = torch.empty_like(there)
    ms = context.device.times({"copy": lambda: here.copy_(there)})["copy"]
    yield {"status": OK, **ms, "bytes": 2 * size, "tb_s": 2 * size / ms["ms"] / 1e9}


def _product(context: Context) -> Iterator[Row]:
    """A square product in bfloat16, of random numbers."""
    n = 64 if context.dry else 8192
    a, b = (torch.randn(n, n, device=context.device.torch, dtype=torch.bfloat16) for _ in range(2))
    ms = context.device.times({"product": lambda: a @ b})["product"]
    yield {"status": OK, **ms, "size": n, "tflops": 2 * n**3 / ms["ms"] / 1e9}


@contextmanager
def compiling() -> Iterator[None]:
    """Triton's kernels are compiled inside the block and not launched."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kept = [(cls, cls.run) for cls in (JITFunction, InterpretedFunction)]

    def only(run: Any) -> Any:
        def compile_only(self: Any, *args: Any, warmup: bool = False, **kw: Any) -> Any:
            return run(self, *args, warmup=True, **kw)

        return compile_only

    for cls, launch in kept:
        cls.run = only(launch)
    try:
        yield
    finally:
        for cls, launch in kept:
            cls.run = launch


def _compile(make: Any) -> Iterator[Row]:
    import time

    try:
        import triton  # noqa: F401
    except ImportError:
        yield {"status": SKIPPED, "why": "triton is not installed"}
        return
    call, start = make(), time.perf_counter()
    with compiling():
        call()
    yield {"status": OK, **spread([1e3 * (time.perf_counter() - start)])}
