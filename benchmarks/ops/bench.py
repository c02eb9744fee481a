"""Time sparse attention against dense SDPA on this machine; nothing is reported unless it is right first.

python benchmarks/ops/bench.py --shapes prefill:window:16384 decode:tokens:32768 --dtype bfloat16
python benchmarks/ops/bench.py --executor torch flex triton --heads 32 --kv-heads 8 --dim 128 --block 128 \\
    --keys 4096 --shapes prefill:blocks:32768 prefill:window:32768 decode:blocks:131072   # on a GPU
"""

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfpatch.core.selection import BlockMap, Causal, Layout, Selection, SinkWindow
from hfpatch.errors import ExecutorError
from hfpatch.ops import attend

DEFAULT = ["prefill:window:16384", "prefill:blocks:16384", "decode:tokens:32768", "decode:blocks:32768"]
VERIFIED_KEYS = 1024
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
    indices = _listed_first(scores.topk(width, dim=-1, sorted=False).indices, own // block_k)
    return BlockMap(indices.to(args.device), counts.to(args.device), args.block, block_k)


def _listed_first(indices: Tensor, last: Tensor) -> Tensor:
    """The blocks a query block can see before those it cannot."""
    return indices.gather(-1, (indices > last[:, None]).to(torch.int8).argsort(dim=-1, stable=True))


def inputs(lq: int, lk: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v with the strides a projection followed by a transpose gives."""
    dtype = getattr(torch, args.dtype)
    sizes = ((lq, args.heads), (lk, args.kv_heads), (lk, args.kv_heads))
    shapes = [(args.batch, n, h, args.dim) for n, h in sizes]
    q, k, v = (torch.randn(s, device=args.device).to(dtype).transpose(1, 2) for s in shapes)
    return q, k.contiguous(), v.contiguous()


def verify(shape: Shape, executor: str, args: argparse.Namespace) -> float:
    """Worst relative error of the executor against the reference, at a length the reference can hold."""
    args = argparse.Namespace(**{**vars(args), "keys": min(args.keys, VERIFIED_KEYS)})
    small = Shape(shape.phase, shape.kind, min(shape.length, 2 * args.keys + 37))
    lq = 1 if small.phase == "decode" else small.length
    q, k, v = inputs(lq, small.length, args)
    worst, sel = 0.0, selection(small, lq, args)
    ref = attend(q, k, v, selection=sel, scale=args.dim**-0.5, executor="reference")
    got = attend(q, k, v, selection=sel, scale=args.dim**-0.5, executor=executor)
    for a, b in ((ref.out, got.out), (ref.lse, got.lse)):
        error = (a.double() - b.double()).norm() / a.double().norm()
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def able(shape: Shape, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """Errors of the executors that are right, and why the others are left out."""
    errors, refused = {}, {}
    for name in args.executor:
        try:
            error = verify(shape, name, args)
        except ExecutorError as e:
            refused[name] = str(e)
            continue
        if error <= TOLERANCE[args.dtype]:
            errors[name] = error
        else:
            refused[name] = f"relative error {error:.1e} against the reference"
    return errors, refused


def dense_calls(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Callable[[], object]]:
    """Dense SDPA; on a GPU once per backend that runs it."""

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=True)

    def on(backend: SDPBackend) -> Callable[[], object]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa()

        return call

    if q.device.type != "cuda":
        return {"dense": sdpa}
    found: dict[str, Callable[[], object]] = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        call = on(getattr(SDPBackend, name))
        with contextlib.suppress(RuntimeError):
            call()
            found[f"dense {name.split('_')[0].lower()}"] = call
    return found or {"dense": sdpa}


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
    """One row of the report: times of dense and of each executor that is right, ratios to the fastest dense."""
    row: dict[str, Any] = {"shape": f"{shape.phase}:{shape.kind}:{shape.length}", "dtype": args.dtype}
    row["error"], row["refused"] = able(shape, args)
    if not row["error"]:
        return row
    lq = 1 if shape.phase == "decode" else shape.length
    q, k, v = inputs(lq, shape.length, args)
    sel, scale = selection(shape, lq, args), args.dim**-0.5
    calls = dense_calls(q, k, v, scale)
    dense = list(calls)
    for name in row["error"]:
        calls[name] = partial(attend, q, k, v, selection=sel, scale=scale, executor=name)
        if lq == 1:
            calls[f"{name}, all keys"] = partial(attend, q, k, v, selection=None, scale=scale, executor=name)
    for name in [n for n in calls if n.endswith(", all keys")]:
        with contextlib.suppress(ExecutorError):
            calls[name]()
            continue
        del calls[name]
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    times = interleaved(calls, args.repeat, q.device.type, clock)
    row["ms"] = {name: statistics.median(t) for name, t in times.items()}
    row["spread_ms"] = {name: [min(t), max(t)] for name, t in times.items()}
    best = min(row["ms"][name] for name in dense)
    row["ratio"] = {name: best / row["ms"][name] for name in row["error"]}
    at = Layout(args.batch, args.heads, args.kv_heads, lq, shape.length, q.device)
    row["density"] = int(sel.attended(at)) / at.visible
    return row


def lines(row: dict[str, Any]) -> str:
    """The row as text; the limit is what the kept share of the keys allows."""
    out = [f"{row['shape']}  {row['dtype']}"]
    if "density" in row:
        out[0] += f"  density {row['density']:.3f}, limit {1 / row['density']:.1f}x"
    for name, ms in row.get("ms", {}).items():
        low, high = row["spread_ms"][name]
        text = f"  {name:<18}{ms:10.3f} ms [{low:.3f}, {high:.3f}]"
        if name in row["ratio"]:
            text += f"  {row['ratio'][name]:.2f}x  error {row['error'][name]:.1e}"
        out.append(text)
    return "\n".join(out + [f"  {name:<18}REFUSED: {why}" for name, why in row["refused"].items()])


def main() -> int:
    """Command line; 1 when a result was refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse(s) for s in DEFAULT])
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--executor", nargs="+", default=["torch"], help="executors to compare")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
            print(lines(rows[-1]), flush=True)
    if args.json:
        about = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        if args.device == "cuda":
            about["device"] = torch.cuda.get_device_name()
        with open(args.json, "w") as f:
            json.dump({**about, "args": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, f, indent=1)
    return int(any(r["refused"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
