"""What patches cost per decoded token where they save nothing: they and the unpatched model take turns on one cache.

A turn is some tokens long, since patching for every token would also measure what a fresh patch works out once.

python benchmarks/overhead.py --length 16384 --tokens 400
python benchmarks/overhead.py --length 8192 --patch dense --patch zerotuning:gamma=2.0 --patch gated
"""

import argparse
import statistics
import time

import torch
from hfpatch.evals.testbed import load
from hfpatch.evals.variants import parse_variants


def main() -> None:
    """Print the median time per token of all, and their ratios to the unpatched model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--run", type=int, default=5, help="tokens in a row under one patch, after one to warm up")
    parser.add_argument("--patch", action="append", help="method:setting=value,...; repeatable; dense by default")
    args = parser.parse_args()
    model, _ = load()
    variants = parse_variants(args.patch or ["dense"])
    ids = torch.randint(10, 1000, (1, args.length), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {v.name: [] for v in variants}
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for n in range(args.tokens // args.run):
            turn = n % len(variants)
            for variant in (variants[turn:] + variants[:turn])[:: -1 if n % 2 else 1]:
                with variant.applied(model):
                    model(ids[:, :1], past_key_values=cache)
                    for _ in range(args.run):
                        start = time.perf_counter()
                        model(ids[:, :1], past_key_values=cache)
                        times[variant.name].append(time.perf_counter() - start)
    base = statistics.median(times[variants[0].name])
    for n, (name, found) in enumerate(times.items()):
        low, middle, high = (1e3 * t for t in statistics.quantiles(found, n=4))
        ratio = "" if n == 0 else f"  {statistics.median(found) / base - 1:+.1%}"
        print(f"{'unpatched' if n == 0 else name:>24}: {middle:.3f} ms per token [{low:.3f}, {high:.3f}]{ratio}")


if __name__ == "__main__":
    main()
