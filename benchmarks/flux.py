"""Flux's speed and memory by share of sparse layers, and what its routers take: all in turn with dense attention.

python benchmarks/flux.py --length 16384 --tokens 32 --repeats 5 --threads 2

The embedded model. Nothing is timed before these hold: no sparse layer gives dense bit for bit, all of them give the
plain streaming patch, the fast executor agrees with the readable one, and a cropped cache gives the logits of a whole
one. Ratios are to dense in the same round; each line has median and range over the rounds.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hfpatch.evals.testbed import load
from torch import Tensor

from hfpatch import PatchConfig, patched
from hfpatch.methods.flux import Flux, FluxConfig
from hfpatch.methods.flux.router import Routers

CHECKED_AT = 1111


def main() -> None:
    """Check, time, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    with torch.inference_mode():
        wrong = bench.wrong()
        if wrong:
            sys.exit(f"refused, nothing was timed: {wrong}")
        rounds = bench.rounds()
    if args.json:
        args.json.write_text(json.dumps(rounds))
    bench.show(rounds)


class Bench:
    """The model, the variants and one measured round of each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, _ = load()
        self.layers = self.model.config.num_hidden_layers
        self.stream = {"sink": args.sink, "window": args.window}
        self.variants: dict[str, Any] = {"dense": None, "learned routers, all full": self.fresh_routers()}
        for k in range(self.layers + 1):
            self.variants[f"{k}/{self.layers} sparse"] = self.first(k)
        for k in range(1, self.layers + 1):
            self.variants[f"{k}/{self.layers} sparse, cropped"] = self.first(k, crop_cache=True)

    def first(self, k: int, **more: Any) -> FluxConfig:
        """The first `k` layers sparse."""
        return FluxConfig(sparse_layers=list(range(k)), sparse_settings=self.stream, **more)

    def fresh_routers(self) -> PatchConfig:
        """Routers as they are before training: they read the prompt and send every layer to full attention."""
        torch.manual_seed(0)
        routers = Routers(range(self.layers), self.model.config.head_dim)
        tensors = {f"0.{k}": t for k, t in routers.state_dict().items()}
        return PatchConfig([FluxConfig(router="learned", sparse_settings=self.stream)], tensors=tensors)

    def ids(self, length: int, seed: int = 0) -> Tensor:
        """Random token ids `[1, length]`."""
        return torch.randint(10, 1000, (1, length), generator=torch.Generator().manual_seed(seed))

    def told(self, config: Any, **settings: Any) -> Tensor:
        """Logits of a prompt of odd length, five single tokens and a later turn of seven."""
        length = max(CHECKED_AT, self.args.window + self.args.sink + 99)
        ids, parts, cache = self.ids(length + 12), [], None
        cuts = [0, *range(length, length + 6), length + 12]
        with patched(self.model, config, **settings) if config else nullcontext():
            for a, b in itertools.pairwise(cuts):
                out = self.model(ids[:, a:b], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
        return torch.cat(parts, 1)

    def wrong(self) -> str | None:
        """What is not as it must be, if anything."""
        dense, all_sparse = self.told(None), self.told(self.first(self.layers))
        readable = FluxConfig(sparse_layers="0-", sparse_settings=self.stream, executor="reference")
        checks: list[tuple[str, Callable[[], bool]]] = [
            ("no sparse layer is not dense", lambda: torch.equal(self.told(self.first(0)), dense)),
            ("new routers are not dense", lambda: torch.equal(self.told(self.fresh_routers()), dense)),
            ("streaming changes nothing", lambda: not close(all_sparse, dense)),
            ("all sparse is not streaming", lambda: torch.equal(self.told("streaming", **self.stream), all_sparse)),
            ("fast and readable executor differ", lambda: close(all_sparse, self.told(readable))),
            *(
                (f"{k} cropped layers differ", lambda k=k: close(self.told(self.first(k, crop_cache=True)),
                                                                 self.told(self.first(k))))
                for k in range(1, self.layers + 1)
            ),
        ]  # fmt: skip
        return next((name for name, holds in checks if not holds()), None)

    def rounds(self) -> dict[str, list[dict[str, float]]]:
        """Measured rounds by variant; the first round warms up and is dropped, order turns with each."""
        found: dict[str, list[dict[str, float]]] = {name: [] for name in self.variants}
        for n in range(self.args.repeats + 1):
            for name in sorted(self.variants, reverse=n % 2 == 1):
                measured = self.measure(self.variants[name])
                if n:
                    found[name].append(measured)
        return found

    def measure(self, config: Any) -> dict[str, float]:
        """Seconds to the first token, per further token and in routers; bytes of the cache."""
        ids = self.ids(self.args.length)
        with patched(self.model, config) if config else nullcontext() as patch:
            routing = timed_routers(patch.methods[0]) if patch else [0.0]
            start = time.perf_counter()
            cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            first = time.perf_counter() - start
            steps = []
            for n in range(self.args.tokens):
                start = time.perf_counter()
                self.model(ids[:, n : n + 1], past_key_values=cache)
                steps.append(time.perf_counter() - start)
        size = sum(t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values))
        return {"ttft": first, "tpot": statistics.median(steps), "router": routing[0], "cache": float(size)}

    def show(self, rounds: dict[str, list[dict[str, float]]]) -> None:
        """The table."""
        a, dense = self.args, rounds["dense"]
        print(f"{a.length} tokens, sink {a.sink}, window {a.window}, {a.threads} threads, {a.repeats} rounds")
        print("| variant | first token | speed-up | per further token | speed-up | cache | router of first token |")
        print("|---|---|---|---|---|---|---|")
        for name, found in rounds.items():
            cells = []
            for key in ("ttft", "tpot"):
                cells.append(spread([f[key] * 1e3 for f in found], "{:.1f}") + " ms")
                cells.append(spread([d[key] / f[key] for d, f in zip(dense, found, strict=True)], "{:.2f}"))
            share = spread([f["router"] / f["ttft"] * 100 for f in found], "{:.3f}")
            print(f"| {name} | {' | '.join(cells)} | {found[0]['cache'] / 2**20:.2f} MiB | {share} % |")


def timed_routers(flux: Flux) -> list[float]:
    """Seconds spent deciding routes, in a list of one that grows."""
    total, decide = [0.0], flux._decide

    def timed(call: Any) -> Tensor:
        start = time.perf_counter()
        route = decide(call)
        total[0] += time.perf_counter() - start
        return route

    flux._decide = timed  # type: ignore[method-assign]
    return total


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding."""
    return float((a - b).abs().max() / b.abs().max()) < 1e-4


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{form} [{form}, {form}]".format(statistics.median(values), min(values), max(values))


if __name__ == "__main__":
    main()
