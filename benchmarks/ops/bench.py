"""Time sparse attention against dense SDPA on this machine; nothing is reported unless it is right first.

python benchmarks/ops/bench.py --shapes prefill:window:16384 decode:tokens:32768 --dtype bfloat16
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfpatch.ops import attend
from hfpatch.selection import BlockMap, Causal, Selection, SinkWindow

DEFAULT = ["prefill:window:16384", "prefill:blocks:16384", "decode:tokens:32768", "decode:blocks:32768"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Shape:
    """`phase:kind:length`, as given on the command line."""

    phase: str
    kind: str
    length: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        phase, kind, length = text.split(":")
        if phase not in ("prefill", "decode") or kind not in ("causal", "window", "blocks", "tokens"):
            raise argparse.ArgumentTypeError(f"{text!r}: give prefill|decode : causal|window|blocks|tokens : length")
        return cls(phase, kind, int(length))


def selection(shape: Shape, lq: int, args: argparse.Namespace) -> Selection:
    """The selection of a shape with `args.keys` keys kept per query; a block map is shared by a GQA group."""
    if shape.kind == "causal":
        return Causal()
    if shape.kind == "window":
        return SinkWindow(args.sink, args.keys - args.sink)
    block_k = 1 if shape.kind == "tokens" else args.block
    off, nq = shape.length - lq, -(-lq // args.block)
    own = (off + (torch.arange(nq) + 1) * args.block).clamp(max=shape.length) - 1
    nk, width = -(-shape.length // block_k), min(args.keys, shape.length) // block_k
    scores = torch.rand(1, args.kv_heads, nq, nk)
    scores.masked_fill_(torch.arange(nk) > own[:, None] // block_k, -1.0)
    scores.scatter_(-1, (own[:, None] // block_k).expand(1, args.kv_heads, nq, 1), 2.0)
    counts = (own // block_k + 1).clamp(max=width).expand(1, args.kv_heads, nq)
    indices = scores.topk(width, dim=-1, sorted=False).indices
    return BlockMap(_listed_first(indices, own // block_k), counts, args.block, block_k)


def _listed_first(indices: Tensor, last: Tensor) -> Tensor:
    """The blocks a query block can see before those it cannot."""
    return indices.gather(-1, (indices > last[:, None]).to(torch.int8).argsort(dim=-1, stable=True))


def inputs(lq: int, lk: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v with the strides a projection followed by a transpose gives."""
    dtype = getattr(torch, args.dtype)
    sizes = ((lq, args.heads), (lk, args.kv_heads), (lk, args.kv_heads))
    q, k, v = (torch.randn(args.batch, n, h, args.dim).to(dtype).transpose(1, 2) for n, h in sizes)
    return q, k.contiguous(), v.contiguous()


def verify(shape: Shape, args: argparse.Namespace) -> float:
    """Worst relative error of the executor against the reference, at a length the reference can hold."""
    small = Shape(shape.phase, shape.kind, min(shape.length, 2 * args.keys + 37))
    lq = 1 if small.phase == "decode" else small.length
    q, k, v = inputs(lq, small.length, args)
    worst, sel = 0.0, selection(small, lq, args)
    ref = attend(q, k, v, selection=sel, scale=args.dim**-0.5, executor="reference")
    got = attend(q, k, v, selection=sel, scale=args.dim**-0.5, executor=args.executor)
    for a, b in ((ref.out, got.out), (ref.lse, got.lse)):
        error = (a.double() - b.double()).norm() / a.double().norm()
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def interleaved(
    calls: dict[str, Callable[[], object]], repeat: int, device: str, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of every call, taken in turns after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (clock() - start))
    return times


def measure(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the report, or why there is none."""
    row: dict[str, Any] = {"shape": f"{shape.phase}:{shape.kind}:{shape.length}", "dtype": args.dtype}
    row["error"] = verify(shape, args)
    if not row["error"] <= TOLERANCE[args.dtype]:
        return row | {"refused": f"relative error {row['error']:.1e} against the reference"}
    lq = 1 if shape.phase == "decode" else shape.length
    q, k, v = inputs(lq, shape.length, args)
    sel, scale = selection(shape, lq, args), args.dim**-0.5
    calls = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=lq > 1, scale=scale, enable_gqa=True),
        "sparse": lambda: attend(q, k, v, selection=sel, scale=scale, executor=args.executor),
    }
    if lq == 1:
        calls["dense_ours"] = lambda: attend(q, k, v, selection=None, scale=scale, executor=args.executor)
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    for name, times in interleaved(calls, args.repeat, q.device.type, clock).items():
        row[f"{name}_ms"] = statistics.median(times)
        row[f"{name}_spread_ms"] = [min(times), max(times)]
    row["ratio"] = row["dense_ms"] / row["sparse_ms"]
    return row


def line(row: dict[str, Any]) -> str:
    """The row as text."""
    head = f"{row['shape']:<26}{row['dtype']:<10}error {row['error']:.1e}  "
    if "refused" in row:
        return f"{head}REFUSED: {row['refused']}"
    names = [n for n in ("dense", "dense_ours", "sparse") if f"{n}_ms" in row]
    cells = [
        f"{n} {row[n + '_ms']:.2f} ms [{row[n + '_spread_ms'][0]:.2f}, {row[n + '_spread_ms'][1]:.2f}]" for n in names
    ]
    return f"{head}{'  '.join(cells)}  ratio {row['ratio']:.2f}"


def main() -> int:
    """Command line; 1 when a result was refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse(s) for s in DEFAULT])
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--executor", default="torch")
    for name, value in (("batch", 1), ("heads", 8), ("kv-heads", 2), ("dim", 64), ("keys", 1024), ("sink", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--block", type=int, default=64, help="queries per block, and keys per block of a block map")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of one thread, for busy machines"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.clock == "cpu" else args.threads)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for shape in args.shapes:
            rows.append(measure(shape, args))
            print(line(rows[-1]), flush=True)
    if args.json:
        about = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        with open(args.json, "w") as f:
            json.dump({**about, "args": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, f, indent=1)
    return int(any("refused" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
