"""Which keys two methods keep, in a few readable lines that know nothing of hfpatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SINK, WINDOW = 2, 8
PAGE, BUDGET, FEWEST_PAGES = 4, 16, 3
FEW = 32  # tokens after earlier ones that are decode steps, for methods that act in these
Pattern = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def streaming(q: Tensor, k: Tensor, i: Tensor, j: Tensor, starts: Tensor) -> Tensor:
    """Keys kept `[B, 1, Lq, Lk]` of queries at `i`, keys at `j`, rows from `starts` on: a sink and a window."""
    real = j - starts[:, None, None, None]
    return (real >= 0) & ((real < SINK) | (i[:, None] - j < WINDOW))


def quest(q: Tensor, k: Tensor, i: Tensor, j: Tensor, starts: Tensor) -> Tensor:
    """Keys kept `[B, Hq, Lq, Lk]` of each query: the pages with the highest bounds on q k, read from all keys anew."""
    keep = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for row, start in enumerate(starts.tolist()):
        for n, last in enumerate(i.tolist()):
            keep[row, :, n, start : last + 1] = _best_pages(q[row, :, n], k[row, :, start : last + 1])
    return keep


def _best_pages(q: Tensor, k: Tensor) -> Tensor:
    """Keys kept `[Hq, L]` of one row's `k [Hkv, L, D]` for its `q [Hq, D]`; heads that share keys share pages."""
    length, group = k.shape[1], q.shape[0] // k.shape[0]
    if length <= BUDGET:
        return torch.ones(q.shape[0], length, dtype=torch.bool)
    pages = k.split(PAGE, dim=1)
    low, high = (torch.stack([extreme(p, 1) for p in pages], 1) for extreme in (torch.amin, torch.amax))
    heads = q.unflatten(0, (-1, group))[:, :, None]
    bounds = torch.maximum(heads * low[:, None], heads * high[:, None]).sum(-1).sum(1)
    bounds[:, -1] = torch.inf
    best = bounds.topk(min(max(FEWEST_PAGES, BUDGET // PAGE), len(pages)), -1).indices
    chosen = torch.zeros_like(bounds, dtype=torch.bool).scatter(1, best, True)
    return chosen.repeat_interleave(PAGE, 1)[:, :length].repeat_interleave(group, 0)


@dataclass(frozen=True)
class Method:
    """Settings of a method of hfpatch, what they keep, the phases it acts in, and what counts as steps of decoding."""

    settings: dict[str, Any]
    pattern: Pattern
    phases: tuple[str, ...] = ("prefill", "chunk", "decode")
    steps: int = 1


METHODS = {
    "streaming": Method({"sink": SINK, "window": WINDOW}, streaming),
    "quest": Method({"min_length": 0, "page": PAGE, "budget": BUDGET}, quest, ("decode",), FEW),
}
