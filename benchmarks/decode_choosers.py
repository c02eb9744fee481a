"""What choosers of keys keep of the attention of single queries on a real model, beside the best choice.

Queries are the last of needle prompts (question and answer). Every chooser takes so many keys per KV group: sink and
recent ones, and the best pages of its own score. Printed: mean attention kept, over all layers and in the worst.

    python benchmarks/decode_choosers.py MODEL --haystack prose --length 2400
"""

import argparse
import math
from collections import defaultdict
from typing import ClassVar

import torch
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.models import load_model
from torch import Tensor

from hfpatch.api import patched_with
from hfpatch.config.method_config import MethodConfig
from hfpatch.core.call import AttentionCall
from hfpatch.core.logits import logits
from hfpatch.core.method import Method
from hfpatch.text.prompt_ids import prompt_ids

SINK, RECENT, PAGE = 16, 64, 16


class ProbeConfig(MethodConfig):
    method: ClassVar[str] = "chooser-probe"


class Probe(Method):
    """Shows each layer's call to `seen` and leaves it dense."""

    def __init__(self, queries: int) -> None:
        super().__init__(ProbeConfig())
        self.queries, self.kept = queries, defaultdict(lambda: defaultdict(list))

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        if call.Lq >= call.Lk:
            measure(call, self.queries, self.kept, call.layer)


def split(x: Tensor, size: int) -> Tensor:
    """`[..., n]` as pages `[..., n / size, size]`."""
    return x.unflatten(-1, (-1, size))


def scores(q: Tensor, k: Tensor, exact: Tensor, rest: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Scores `[H, R, pages]` and page size by chooser: scaled `q [H, G, R, D]`, `k [H, n, D]`."""

    def mass(page: Tensor) -> Tensor:  # log masses per head to the group's
        return (page - torch.cat([page, rest], -1).logsumexp(-1, keepdim=True)).exp().sum(1)

    def dots(q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("hgrd,hnd->hgrn", q, k)

    found = {"exact, tokens": (exact, 1), "exact, pages of 8": (split(exact, 8).sum(-1), 8)}
    found["exact, pages of 16"] = split(exact, PAGE).sum(-1), PAGE
    pages = k.unflatten(1, (-1, PAGE))
    bounds = dots(q.clamp(min=0), pages.amax(2)) + dots(q.clamp(max=0), pages.amin(2))
    found["quest's bounds, pages of 16"] = bounds.sum(1), PAGE
    half = k.shape[-1] // 2
    for size in (4, 8, PAGE):
        sub = k.unflatten(1, (-1, size))
        mean = dots(q, sub.mean(2)) + math.log(size)
        plane = sub.var(2, unbiased=False)
        plane = (plane[..., :half] + plane[..., half:]) / 2  # per rotary plane, as keys turn
        square = q.square()[..., :half] + q.square()[..., half:]
        found[f"means of {size}"] = mass(mean), size
        found[f"means and variances of {size}"] = mass(mean + dots(square, plane) / 2), size
    for bits in (4, 8):
        step = k.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        found[f"{bits}-bit keys, tokens"] = mass(dots(q, (k / step).round() * step)), 1
    return found


def measure(call: AttentionCall, queries: int, kept: dict[str, dict[int, list[float]]], layer: int) -> None:
    """Add what every chooser keeps of the call's last queries at a quarter and an eighth of the keys."""
    q, k, n = call.q[0, :, -queries:].float(), call.k[0].float(), call.Lk
    every = logits(q[None], k[None], scale=call.scale, softcap=call.softcap)[0].unflatten(0, (call.Hkv, -1))
    every = every.masked_fill(torch.arange(n) > torch.arange(n - queries, n)[:, None], -torch.inf)
    weights = every.softmax(-1)  # [H, G, R, n]
    stop = (n - queries - RECENT) // PAGE * PAGE
    forced = torch.ones(n, dtype=torch.bool)
    forced[SINK:stop] = False
    grouped = (q * call.scale).unflatten(0, (call.Hkv, -1))
    rest = every[..., forced].logsumexp(-1, keepdim=True)
    for share in (0.25, 0.125):
        room = int(share * n) - int(forced.sum())
        for name, (score, size) in scores(grouped, k[:, :stop], weights.sum(1)[..., :stop], rest).items():
            score = score.clone()
            score[..., : SINK // size] = -torch.inf
            best = score.topk(min(room // size, score.shape[-1])).indices
            mask = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True).repeat_interleave(size, -1)
            mask = torch.nn.functional.pad(mask, (0, n - stop), value=True) | forced
            kept[f"{share:g} {name}"][layer].append((weights * mask[:, None]).sum(-1).mean().item())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--haystack", default="prose")
    parser.add_argument("--length", type=int, default=2400)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    loaded, probe = load_model(args.model, args.dtype), Probe(args.queries)
    depths = [100 * (n + 0.5) / args.samples for n in range(args.samples)]
    for sample in NiahJob([args.length], depths, 1, args.haystack).build(loaded, args.length, 0):
        ids = torch.tensor([prompt_ids(loaded.tokenizer, sample.prompt + sample.continuation)], device=loaded.device)
        with patched_with(loaded.model, [probe]):
            loaded.model(ids, use_cache=False, logits_to_keep=1)
    for name, layers in probe.kept.items():
        means = [sum(found) / len(found) for found in layers.values()]
        print(f"{name:34} all layers {sum(means) / len(means):.3f}  worst {min(means):.3f}")


if __name__ == "__main__":
    main()
