"""Reweighting softmax weights after the fact, exact on top of any executor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .call import AttentionCall
from .selection import Selection


@dataclass(frozen=True, eq=False)
class Columns:
    """Key columns `keys [n]` and the factor on their softmax weights, a number or `[Hq]`."""

    keys: Tensor
    factor: float | Tensor


def column_weights(call: AttentionCall, keys: Tensor, lse: Tensor, selection: Selection | None) -> Tensor:
    """Softmax weights `[B, Hq, Lq, n]` in float32 of the key columns `keys [n]`, given `lse [B, Hq, Lq]`."""
    k = call.k[:, :, keys].float().repeat_interleave(call.groups, dim=1)
    logits = call.scale * (call.q.float() @ k.transpose(-1, -2))
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if call.bias is not None:
        logits = logits + call.bias[..., keys].float()[:, :, None]
    i, j = call.layout.positions(keys)
    seen = (j <= i)[None, None] if selection is None else selection.mask(call.layout, keys)
    weights = torch.exp(logits - lse[..., None])
    return torch.where(seen & torch.isfinite(lse)[..., None], weights, torch.zeros_like(weights))


def regroup(
    call: AttentionCall, out: Tensor, lse: Tensor, groups: list[Columns], selection: Selection | None
) -> tuple[Tensor, Tensor]:
    """Multiply the softmax weights of each column group by its factor and renormalise.

    `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]`; a sink logit keeps factor 1. Groups must be disjoint.
    With masses m_i and partial outputs o_i: out' = (out + sum (f_i - 1) o_i) / (1 + sum (f_i - 1) m_i).
    """
    total = out.float()
    norm = torch.ones_like(lse)
    for group in groups:
        weights = column_weights(call, group.keys, lse, selection)
        extra = torch.as_tensor(group.factor, device=out.device, dtype=torch.float32) - 1
        weights = weights * extra.reshape(1, -1, 1, 1)
        values = call.v[:, :, group.keys].float().repeat_interleave(call.groups, dim=1)
        total = total + (weights @ values).transpose(1, 2)
        norm = norm + weights.sum(-1)
    return (total / norm.transpose(1, 2)[..., None]).to(out.dtype), lse + norm.log()
