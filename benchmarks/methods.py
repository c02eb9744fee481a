"""Time methods, choosing included, against dense SDPA on one layer; nothing is reported unless it is right first.

python benchmarks/methods.py --patch block_topk:budget=1024 --patch quest:budget=2048 --lengths 4096 16384 32768

Random queries, keys and values of one layer; prefill takes the whole prompt in one call, decode steps one token at a
time. `--memory` reads the peak of every variant in a child process (or of the CUDA allocator) instead of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hfpatch.evals.run.peak import GIVE_BACK, peak_reader, trim
from hfpatch.evals.run.stats import apart, break_even, break_even_text, summarise
from hfpatch.evals.run.variants import parse_variants
from layer import Layer

from hfpatch import get_method
from hfpatch.core.method import Method

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
Row = dict[str, Any]


def phases(methods: list[Method]) -> list[str]:
    """The phases in which any of the methods acts."""
    return [p for p in ("prefill", "decode") if any(p in m.acts_in for m in methods)]


def make(variant: Any) -> list[Method]:
    """New methods, without state."""
    return [get_method(c.method)(c) for c in variant.config.methods]


def wrong_by(variant: Any, args: argparse.Namespace, phase: str) -> float:
    """Relative error against the reference executor under the method's own choice, at a length that one can hold."""
    layer = Layer(args, args.check, 1, make(variant))
    if phase == "prefill":
        call = layer.call("prefill", 0, args.check)
        chosen = layer.select(call)
    else:
        layer.select(layer.call("prefill", 0, args.check))
        call = layer.call("decode", args.check, args.check + 1)
        chosen = layer.select(call)
    got, want = (layer.attend(call, chosen, e).out.double() for e in (None, "reference"))
    return float((got - want).norm() / want.norm())


def timed(call: Callable[[], Any], args: argparse.Namespace) -> tuple[float, Any]:
    """Seconds and result."""
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = call()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def measure(variants: list[Any], length: int, phase: str, args: argparse.Namespace) -> list[Row]:
    """All variants and dense in turns; one row per variant."""
    steps = args.repeat if phase == "prefill" else args.steps
    layers = {v.name: Layer(args, length, steps + 1, make(v)) for v in variants}
    dense, choose, run, kept = [], {v.name: [] for v in variants}, {v.name: [] for v in variants}, {}
    if phase == "decode":
        for layer in layers.values():
            layer.select(layer.call("prefill", 0, length))
    for turn in range(steps + 1):
        span = (0, length) if phase == "prefill" else (length + turn, length + turn + 1)
        first = next(iter(layers.values()))
        call = first.call(phase, *span)
        took, _ = timed(partial(first.dense, call), args)
        dense.append(took)
        for name, layer in layers.items():
            layer.states = {} if phase == "prefill" else layer.states
            call = layer.call(phase, *span)
            took, chosen = timed(partial(layer.select, call), args)
            choose[name].append(took)
            took, _ = timed(partial(layer.attend, call, chosen), args)
            run[name].append(took)
            if not turn:
                at = call.layout
                kept[name] = 1.0 if chosen is None else int(chosen.attended(at)) / at.visible
    base = summarise(dense[1:])
    rows = []
    for name in layers:
        whole = summarise([a + b for a, b in zip(choose[name][1:], run[name][1:], strict=True)])
        share = summarise(choose[name][1:])["median"] / whole["median"]
        rows.append({
            "variant": name, "phase": phase, "length": length, "dense": base, "sparse": whole, "density": kept[name],
            "choosing": share, "ratio": base["median"] / whole["median"], "clear": apart(base, whole),
        })  # fmt: skip
    return rows


def line(row: Row) -> str:
    """The row as text."""
    d, s = row["dense"], row["sparse"]
    return (
        f"{row['variant']:<34} {row['phase']:<8}{row['length']:>7}  dense {d['median'] * 1e3:.2f} ms "
        f"[{d['low'] * 1e3:.2f}, {d['high'] * 1e3:.2f}]  method {s['median'] * 1e3:.2f} ms [{s['low'] * 1e3:.2f}, "
        f"{s['high'] * 1e3:.2f}]  ratio {row['ratio']:.2f}{'' if row['clear'] else ' (spreads overlap)'}  "
        f"choosing {row['choosing']:.0%}  density {row['density']:.3f}"
    )


def peak(variant: Any | None, length: int, args: argparse.Namespace) -> int:
    """Peak bytes of one prefill call above what its tensors take."""
    layer = Layer(args, length, 0, make(variant) if variant else [])
    small = Layer(args, 256, 0, make(variant) if variant else [])
    for one in (small, layer):
        if one is layer:
            trim()
            reader = peak_reader(torch.device(args.device))
            reader.reset()
            before = reader.now()
        call = one.call("prefill", 0, one.length)
        if variant is None:
            one.dense(call)
        else:
            one.attend(call, one.select(call))
    return reader.peak() - before


def memory(words: list[str], variants: list[Any], args: argparse.Namespace) -> None:
    """Print the peaks, each read in a process of its own."""
    for length in args.lengths:
        found = {}
        for name in ("dense", *(v.name for v in variants)):
            child = [sys.executable, __file__, *words, "--peak-of", name, "--peak-at", str(length)]
            env = {**GIVE_BACK, **os.environ}
            done = subprocess.run(child, capture_output=True, text=True, check=True, env=env)
            found[name] = int(done.stdout.splitlines()[-1])
        for name, size in found.items():
            print(f"{name:<34} prefill {length:>7}  peak {size / 2**20:8.1f} MiB  {size / found['dense']:.2f} x dense")


def main() -> int:
    """Command line; 1 when a result was refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patch", action="append", required=True, help="method:setting=value,...; repeatable")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768])
    parser.add_argument("--phases", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--executor", default=None)
    for name, value in (("heads", 8), ("kv-heads", 2), ("dim", 64), ("repeat", 5), ("steps", 60), ("check", 2085)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread, for busy machines")
    parser.add_argument("--memory", action="store_true", help="peak memory of prefill instead of time")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--peak-at", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.clock == "cpu" else args.threads)
    variants = parse_variants(args.patch)[1:]
    with torch.inference_mode():
        if args.peak_of:
            found = {v.name: v for v in variants}
            print(peak(found.get(args.peak_of), args.peak_at, args))
            return 0
        if args.memory:
            memory(sys.argv[1:], variants, args)
            return 0
        rows: list[Row] = []
        refused = 0
        for phase in args.phases:
            fit = []
            for v in variants:
                if phase not in phases(make(v)):
                    continue
                error = wrong_by(v, args, phase)
                if error <= TOLERANCE[args.dtype]:
                    fit.append(v)
                else:
                    refused += 1
                    print(f"{v.name} {phase}: REFUSED, relative error {error:.1e} against the reference")
            for length in args.lengths if fit else ():
                for row in measure(fit, length, phase, args):
                    rows.append(row)
                    print(line(row), flush=True)
            for v in fit:
                own = [r for r in rows if r["variant"] == v.name and r["phase"] == phase]
                clear = [r["length"] for r in own if r["clear"]]
                print(
                    f"{v.name}, {phase}: {break_even_text(break_even({r['length']: r['ratio'] for r in own}, clear))}"
                )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"args": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, f, indent=1)
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
