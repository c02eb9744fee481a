"""What a patch that changes nothing costs per decoded token: patched and unpatched take turns on one cache.

python benchmarks/overhead.py --length 16384 --tokens 400
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from hfpatch.evals.testbed import load

from hfpatch import patched


def main() -> None:
    """Print the median time per token of both, and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    model, _ = load()
    ids = torch.randint(10, 1000, (1, args.length), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"unpatched": [], "dense": []}
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for n in range(args.tokens):
            for name in sorted(times, reverse=n % 2 == 0):
                with patched(model, "dense") if name == "dense" else nullcontext():
                    start = time.perf_counter()
                    model(ids[:, :1], past_key_values=cache)
                    times[name].append(time.perf_counter() - start)
    base, dense = (statistics.median(times[n]) for n in ("unpatched", "dense"))
    for name, found in times.items():
        low, _, high = statistics.quantiles(found, n=4)
        print(f"{name:>9}: {statistics.median(found) * 1e3:.3f} ms per token [{low * 1e3:.3f}, {high * 1e3:.3f}]")
    print(f"dense / unpatched: {dense / base:.4f}")


if __name__ == "__main__":
    main()
