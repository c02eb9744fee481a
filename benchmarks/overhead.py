"""What patches cost where they save nothing, per prompt and per decoded token, in turns with the unpatched model.

Prompts are processed anew in every turn. Tokens are decoded on one cache, some in a row, since patching for every
token would also measure what a fresh patch works out once.

python benchmarks/overhead.py --length 16384 --tokens 400
python benchmarks/overhead.py --length 8192 --prompts 12 --patch dense --patch zerotuning:gamma=2.0 --patch gated
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hfpatch.evals.run.variants import Variant, parse_variants
from hfpatch.evals.testbed import load
from torch import Tensor

Times = dict[str, list[float]]


def turns(variants: list[Variant], count: int) -> Iterator[Variant]:
    """Every variant `count` times, so that none keeps a place in the order."""
    for n in range(count):
        at = n % len(variants)
        yield from (variants[at:] + variants[:at])[:: -1 if n % 2 else 1]


def timed(times: list[float], work: Callable[[], Any]) -> None:
    """Add the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)


def prefill(model: Any, ids: Tensor, variants: list[Variant], prompts: int) -> Times:
    """Seconds of every prompt's prefill."""
    times: Times = {v.name: [] for v in variants}
    model(ids, use_cache=True, logits_to_keep=1)
    for variant in turns(variants, prompts):
        with variant.applied(model):
            timed(times[variant.name], lambda: model(ids, use_cache=True, logits_to_keep=1))
    return times


def decode(model: Any, ids: Tensor, variants: list[Variant], tokens: int, run: int) -> Times:
    """Seconds of every token but the first of each turn."""
    times: Times = {v.name: [] for v in variants}
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    for variant in turns(variants, tokens // run):
        with variant.applied(model):
            model(ids[:, :1], past_key_values=cache)
            for _ in range(run):
                timed(times[variant.name], lambda: model(ids[:, :1], past_key_values=cache))
    return times


def show(what: str, times: Times) -> None:
    """Medians and quartiles in milliseconds, and medians against the unpatched model, which comes first."""
    base = statistics.median(next(iter(times.values())))
    for n, (name, found) in enumerate(times.items()):
        low, middle, high = (1e3 * t for t in statistics.quantiles(found, n=4))
        ratio = "" if n == 0 else f"  {statistics.median(found) / base - 1:+.1%}"
        print(f"{'unpatched' if n == 0 else name:>24}: {middle:.3f} ms per {what} [{low:.3f}, {high:.3f}]{ratio}")


def main() -> None:
    """Print the medians of all and their ratios to the unpatched model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--prompts", type=int, default=0, help="prompts per variant; 0 skips the prefill")
    parser.add_argument("--tokens", type=int, default=400, help="decoded tokens per variant; 0 skips them")
    parser.add_argument("--run", type=int, default=5, help="tokens in a row under one patch, after one to warm up")
    parser.add_argument("--patch", action="append", help="method:setting=value,...; repeatable; dense by default")
    args = parser.parse_args()
    model, _ = load()
    variants = parse_variants(args.patch or ["dense"])
    ids = torch.randint(10, 1000, (1, args.length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if args.prompts:
            show("prompt", prefill(model, ids, variants, args.prompts))
        if args.tokens:
            show("token", decode(model, ids, variants, args.tokens, args.run))


if __name__ == "__main__":
    main()
