"""Training labels of the boundary predictor: where a sentence begins, or where attention to both sides differs."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...core.logits import causal, logits, weights

EPS = 1e-6
CHUNK_ELEMENTS = 1 << 22
END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\uff09]*|\n+")


def sentence_starts(text: str, starts: Sequence[int]) -> Tensor:
    """Labels `[L]`: 1 at tokens that begin a sentence or a line, but the first; `starts` is where tokens begin.

    Not the paper's labels: no attention is looked at, and all layers have the same.
    """
    begins, out = torch.tensor(starts), torch.zeros(len(starts) + 1)
    cuts = torch.tensor([m.end() for m in END.finditer(text)], dtype=begins.dtype)
    out[torch.searchsorted(begins, cuts)] = 1
    return out[:-1]


def mass_ratio(call: AttentionCall, w: int = 4, sliding: int | None = None) -> Tensor:
    """Attention-mass ratio `[B, Lk]` in float64; entry p compares tokens p-w..p-1 with p..p+w-1, nan at the ends.

    With A the softmax map averaged over heads, past and future are the sums of A over the two windows, for queries
    from token p+w-1 on (at most `sliding` further on sliding layers); the ratio is the larger over the smaller.
    Works through blocks of queries; the map as a whole never exists. Meant for a prefill from token 0.
    """
    n = call.Lk
    past, future = (torch.zeros(call.B, n, dtype=torch.float64, device=call.q.device) for _ in range(2))
    if n < 2 * w:
        return torch.full_like(past, torch.nan)
    columns = torch.arange(n - w + 1, device=call.q.device)
    step = max(1, CHUNK_ELEMENTS // (call.Hq * n * call.B))
    for start in range(0, call.Lq, step):
        rows = torch.arange(start, min(start + step, call.Lq), device=call.q.device)
        sums = _mean_map(call, rows).double().unfold(-1, w, 1).sum(-1)
        position = (rows + call.off)[:, None]
        for out, shift in ((past, w), (future, 0)):
            p = columns + shift
            reach = (position >= p + w - 1) & ((p + w - 1 + sliding > position) if sliding else True)
            inside = columns[p < n]
            out[:, inside + shift] += (sums * reach).sum(1)[:, inside]
    high, low = past.maximum(future), past.minimum(future)
    ratio = (high + EPS) / (low + EPS)
    ratio[:, : 2 * w] = ratio[:, n - 2 * w + 1 :] = torch.nan
    return ratio


def _mean_map(call: AttentionCall, rows: Tensor) -> Tensor:
    """Attention weights `[B, R, Lk]` of queries `rows [R]`, averaged over heads, in float32."""
    every = logits(call.q[:, :, rows].float(), call.k.float(), scale=call.scale, softcap=call.softcap, bias=call.bias)
    return weights(causal(every, rows + call.off, call.k_pos), call.sinks).mean(1)


def targets(ratio: Tensor, beta: float = 2.0) -> Tensor:
    """Labels of `ratio [B, L]`: 1 at boundaries, 0 elsewhere, nan where there is no full window."""
    return torch.where(ratio.isnan(), torch.nan, (ratio >= beta).float())
