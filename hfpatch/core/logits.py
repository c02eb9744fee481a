"""Attention logits and weights in one place: scale, soft-cap, bias, causality, sinks.

Letters: R queries of a call and n of its keys; the rest as in `selection`.
"""

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)` of logits of any shape; as they are without a soft-cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def biased(logits: Tensor, bias: Tensor | None) -> Tensor:
    """`logits [B, Hq, R, n]` plus what a call adds to its key columns, `bias [B|1, Hq|1, n]`."""
    return logits if bias is None else logits + bias.to(logits.dtype)[:, :, None]


def logits(q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Logits `[B, Hq, R, n]` of `q [B, Hq, R, D]` and `k [B, Hkv, n, D]`, in their dtype.

    Scaled, soft-capped, and only then biased by `bias [B|1, Hq|1, n]`.
    """
    (b, hq, rows, _), (_, hkv, keys, _) = q.shape, k.shape
    grouped = (scale * q).unflatten(1, (hkv, -1)).flatten(2, 3)  # [B, Hkv, G R, D]
    return biased(capped(_products(grouped, k).view(b, hq, rows, keys), softcap), bias)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """`q [B, H, n, D] @ k [B, H, m, D]^T`; head by head where PyTorch would copy strided keys of half precision."""
    if k.device.type != "cpu" or k.dtype.itemsize > 2:
        return q @ k.mT
    out = q.new_empty(*q.shape[:3], k.shape[2])
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            torch.mm(q[b, h], k[b, h].mT, out=out[b, h])
    return out


def causal(logits: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """`logits [..., R, n]`, -inf where a key at `k_pos [n]` comes after the query at `q_pos [R]`."""
    return logits.masked_fill(k_pos > q_pos[:, None], -torch.inf)


def log_sum(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Log-sum-exp `[B, Hq, R]` of `logits [B, Hq, R, n]`, with the logits `sinks [Hq]` of heads that have one."""
    total = logits.logsumexp(-1)
    return total if sinks is None else torch.logaddexp(total, sinks.to(total.dtype)[:, None])


def weights(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax weights `[B, Hq, R, n]`; what `sinks [Hq]` take is missing from their sum."""
    return torch.exp(logits - log_sum(logits, sinks)[..., None])
