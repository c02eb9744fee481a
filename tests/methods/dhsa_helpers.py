"""DHSA in small, calls for it, and its rule head by head and token by token."""

import math
from typing import Any

import torch
from torch import Tensor

from hfpatch import get_method
from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import Selection
from hfpatch.methods.dhsa import Dhsa

SMALL: dict[str, Any] = {
    "budget": 40, "sink": 3, "local": 5, "block_q": 8, "chunk": 5, "radius": 3, "boundary_window": 2, "longest": 11,
    "question_tokens": 0, "close_after": 6, "score": "mass", "boundaries": "novelty",
}  # fmt: skip


def method(**settings: Any) -> Dhsa:
    cls = get_method("dhsa")
    return cls(cls.config_class(**{**SMALL, **settings}))


def call(
    lq: int, lk: int, heads: tuple[int, int] = (8, 2), batch: int = 3, states: dict | None = None, seed: int = 0
) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    hq, hkv = heads
    phase = "decode" if lq == 1 else "prefill" if lq == lk else "chunk"
    q, k, v = (torch.randn(batch, h, lk, 16, generator=g) for h in (hq, hkv, hkv))
    return AttentionCall(
        0, 1, phase, q[:, :, lk - lq :], k, v, 0.25, rows=tuple(range(batch)), states={} if states is None else states
    )


def by_loops(m: Dhsa, c: AttentionCall, starts: Tensor, ends: Tensor) -> Tensor:
    """The rule of the method, head by head and token by token: `[B, Hkv, Lq, Lk]`."""
    s = m.config
    keep = torch.ones(c.B, c.Hkv, c.Lq, c.Lk, dtype=torch.bool).tril(c.off)
    block = 1 if c.Lq == 1 else s.block_q
    stop = c.Lq if c.Lq == 1 else c.Lq - s.question_tokens
    dense = min(max(0, (s.budget - c.off) // block * block), stop)
    q = c.q.double().unflatten(1, (c.Hkv, c.groups))
    for b in range(c.B):
        chunks = [(x, y) for x, y in zip(starts[b].tolist(), ends[b].tolist(), strict=True) if y > x]
        for h in range(c.Hkv):
            keys = {(x, y): c.k[b, h, x:y].double() for x, y in chunks}
            for first in range(dense, stop, block):
                last = min(first + block, stop)
                score = by_loops_score(m, keys, q[b, h, :, first:last].mean(1), c.off + first)
                low, high = max(c.off + first - s.local, s.sink), c.off + last
                listed = [*range(s.sink), *range(low, high)]
                for x, y in sorted(score, key=lambda span: -score[span]):
                    listed += list(range(max(x, s.sink), min(y, low)))[: s.budget - len(listed)]
                assert len(listed) == len(set(listed)) == s.budget
                seen = torch.zeros(c.Lk, dtype=torch.bool)
                seen[listed] = True
                keep[b, h, first:last] &= seen
    return keep


def variance(k: Tensor) -> Tensor:
    """Variance `[D]` of keys `[n, D]`, averaged over channels d and d + D/2."""
    return k.var(0, correction=0).unflatten(0, (2, -1)).mean(0).repeat(2)


def by_loops_score(m: Dhsa, keys: dict, q: Tensor, upto: int) -> dict[tuple[int, int], float]:
    """Score of every chunk for the queries `q [G, D]` of one group, which begin at token `upto`."""
    past = [span for span in keys if span[1] <= upto]
    mean = {span: k.mean(0) for span, k in keys.items()}
    if m.config.score == "mass":
        total = dict.fromkeys(keys, 0.0)
        for one in q:
            logit = {s: float(one @ mean[s] / 4 + (one / 4) ** 2 @ variance(k) / 2) for s, k in keys.items()}
            norm = sum((y - x) * math.exp(logit[x, y]) for x, y in past)
            for span in keys:
                total[span] += math.exp(logit[span]) / norm
        return total
    common = torch.cat([keys[span] for span in past]).mean(0) if m.config.score == "centered" and past else 0
    return {(x, y): float(q.mean(0) @ (mean[x, y] - common)) * math.sqrt(y - x) for x, y in keys}


def mask(selection: Selection, c: AttentionCall) -> Tensor:
    return selection.mask(c.layout).expand(c.B, c.Hq, c.Lq, c.Lk)
