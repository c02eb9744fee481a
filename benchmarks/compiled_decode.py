"""Milliseconds per decoded token: Transformers as it is, and compiled with a StaticCache, with and without patches.

All go on from one prompt, which is read once but for its last 64 tokens: each variant reads these itself. Before a
time is shown, a compiled variant has to pick the tokens that the same variant picks as it is, unless rounding
decided. Then the variants take turns, some tokens in a row. Compiling takes minutes; PyTorch keeps what it compiled.
On a machine that others use too, with one thread, CPU time says more than the clock. Ctrl-C shows what there is.

python benchmarks/compiled_decode.py FOLDER --dtype bfloat16 --patch quest:min_length=0 --patch streaming:phase=decode
python benchmarks/compiled_decode.py FOLDER --profile
"""

import argparse
import copy
import statistics
import time
from itertools import chain
from typing import Any

import torch
from hfpatch.evals.run.variants import Variant, parse_variants
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hfpatch import patch_model

OWN, CHECKED = 64, 16
NEAR = {"float32": 0.01, "bfloat16": 0.5}  # differences of logits that rounding may make


class Lane:
    """A variant with a model and a cache of its own, as it is or compiled; models share their weights."""

    def __init__(self, model: Any, variant: Variant, cache: Any, compiled: bool, backend: str) -> None:
        weights = {id(x): x for x in chain(model.parameters(), model.buffers())}
        self.model = copy.deepcopy(model, weights)
        if variant.config is not None:
            patch_model(self.model, variant.config)
        self.name = f"{variant.name}{', compiled' if compiled else ''}"
        self.cache = cache
        self.times, self.cpu = list[float](), list[float]()
        self.forward = torch.compile(self.model, fullgraph=True, backend=backend) if compiled else self.model

    def read(self, ids: Tensor) -> Tensor:
        """Logits `[1, V]` after the end of the prompt."""
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]  # type: ignore[no-any-return]

    def step(self, token: Tensor) -> Tensor:
        """Logits `[1, V]` after one more token `[1, 1]`."""
        return self.forward(token, past_key_values=self.cache).logits[:, -1]  # type: ignore[no-any-return]

    def run(self, token: Tensor, count: int) -> None:
        """Time `count` steps, after one that is not timed."""
        self.step(token)
        for _ in range(count):
            wall, cpu = time.perf_counter(), time.process_time()
            self.step(token)
            self.times.append(1e3 * (time.perf_counter() - wall))
            self.cpu.append(1e3 * (time.process_time() - cpu))


def static(model: Any, cache: DynamicCache, slots: int) -> StaticCache:
    """A static cache with the keys and values of another."""
    made = StaticCache(model.config, max_cache_len=slots)
    for n, layer in enumerate(cache.layers):
        made.update(layer.keys, layer.values, n)
    return made


def check(plain: Lane, compiled: Lane, ids: Tensor, near: float) -> float:
    """The largest difference of logits on the tokens that `plain` picks. Raises SystemExit where another is picked."""
    want, got, most = plain.read(ids), compiled.read(ids), 0.0
    for _ in range(CHECKED):
        token = want.argmax(-1, keepdim=True)
        most = max(most, float((want - got).abs().max()))
        lost = float(want.max() - want.gather(1, got.argmax(-1, keepdim=True)))
        if lost > near:
            raise SystemExit(f"{compiled.name} picks another token than {plain.name}, {lost:.3f} below the best")
        want, got = plain.step(token), compiled.step(token)
    return most


def profile(lane: Lane, token: Tensor, steps: int = 5) -> None:
    """Print where the time of a step goes."""
    lane.step(token)
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            lane.step(token)
    wall = 1e3 * (time.perf_counter() - start) / steps
    ops = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    inside = sum(e.self_cpu_time_total for e in ops) / 1e3 / steps
    print(f"{lane.name}: {wall:.1f} ms per token under the profiler, {inside:.1f} of them in operations")
    for e in ops[:12]:
        print(f"  {e.key:>40} {e.count // steps:>6} calls {e.self_cpu_time_total / 1e3 / steps:8.2f} ms")


def lanes(model: Any, ids: Tensor, args: argparse.Namespace) -> list[Lane]:
    """All variants, checked, their prompts read."""
    shared = model(ids[:, :-OWN], use_cache=True, logits_to_keep=1).past_key_values
    slots = args.length + CHECKED + (args.turns * (args.run + 1)) + 8
    out: list[Lane] = []
    for variant in parse_variants(args.patch or []):
        plain = Lane(model, variant, copy.deepcopy(shared), False, args.backend)
        if args.profile:
            plain.read(ids[:, -OWN:])
            profile(plain, ids[:, -1:])
            continue
        compiled = Lane(model, variant, static(model, shared, slots), True, args.backend)
        start = time.perf_counter()
        most = check(plain, compiled, ids[:, -OWN:], NEAR[args.dtype])
        took = time.perf_counter() - start
        print(f"{compiled.name}: same tokens, logits within {most:.1e}; {took:.0f} s to compile and check", flush=True)
        out += [plain, compiled]
    return out


def main() -> None:
    """Check, take turns, print medians, quartiles and ratios to the unpatched model (dense) as it is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a Transformers folder")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", choices=sorted(NEAR), default="float32")
    parser.add_argument("--patch", action="append", help="method:setting=value,...; repeatable")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--run", type=int, default=8, help="timed tokens in a row, after one that is not")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--profile", action="store_true", help="where a step goes, nothing compiled")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    ids = torch.randint(10, 1000, (1, args.length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = lanes(model, ids, args)
        try:
            for n in range(args.turns):
                for lane in found if n % 2 else found[::-1]:
                    lane.run(torch.full((1, 1), 100), args.run)  # strides as in the check: others are compiled anew
        except KeyboardInterrupt:
            print("stopped early")
    for what in ("times", "cpu"):
        print({"times": "ms per token", "cpu": "ms of CPU time per token, of all threads"}[what])
        for lane in (x for x in found if len(x.times) > 1):
            low, middle, high = statistics.quantiles(getattr(lane, what), n=4)
            ratio = middle / statistics.median(getattr(found[0], what))
            print(f"  {lane.name:>40}: {middle:7.1f} [{low:.1f}, {high:.1f}], {ratio:.2f} of dense")


if __name__ == "__main__":
    main()
