"""Reweighting softmax weights after the fact, exact on top of any executor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import AttentionCall
from .selection import Causal, Selection

VANISHED = 1e-5
Factor = float | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Columns:
    """Different key columns `keys` and the factor on their softmax weights.

    `keys`: a tensor `[n]`, or a slice with start and stop. `factor`: a number, `[Hq]`, a tensor that broadcasts
    to `[B, Hq, Lq, n]`, or a function from the weights `[B, Hq, Lq, n]` before this regroup to such a tensor.
    `positive`: a tensor or function known to stay above 1e-5, which saves looking for queries left with nothing.
    """

    keys: Tensor | slice
    factor: Factor
    positive: bool = False

    def indices(self, device: torch.device) -> Tensor:
        """The columns as a tensor `[n]`."""
        if isinstance(self.keys, slice):
            return torch.arange(self.keys.start, self.keys.stop, device=device)
        return self.keys.to(device)


def column_weights(call: AttentionCall, keys: Tensor | slice, lse: Tensor, selection: Selection | None) -> Tensor:
    """Softmax weights `[B, Hq, Lq, n]` in lse's dtype of the key columns `keys`, given `lse [B, Hq, Lq]`."""
    q = call.q.to(lse.dtype).unflatten(1, (call.Hkv, call.groups))
    k = call.k[:, :, None, keys].to(lse.dtype)
    logits = (q * (k * call.scale)).sum(-1, keepdim=True) if k.shape[3] == 1 else q @ (k * call.scale).mT
    logits = logits.flatten(1, 2)
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if call.bias is not None:
        logits = logits + call.bias[..., keys].to(lse.dtype)[:, :, None]
    weights = torch.exp(logits - lse[..., None])
    dense = selection is None or isinstance(selection, Causal)
    if dense and isinstance(keys, slice) and keys.stop <= call.off + 1:
        return weights
    columns = Columns(keys, 1.0).indices(lse.device)
    seen = (selection or Causal()).mask(call.layout, columns)
    return torch.where(seen & torch.isfinite(lse)[..., None], weights, 0.0)


def regroup(
    call: AttentionCall, out: Tensor, lse: Tensor, groups: list[Columns], selection: Selection | None
) -> tuple[Tensor, Tensor]:
    """Multiply the softmax weights of each column group by its factor and renormalise, one group after the other.

    `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]`; a sink logit keeps factor 1. Groups may share columns: each sees the
    weights the earlier ones left. With weights w and factors f on columns C:
    out' = (out + sum_C (f - 1) w v) / (1 + sum_C (f - 1) w).
    A query left with less than 1e-5 of its weight, where float32 ends here, sees nothing: out 0, lse -inf.
    """
    total = out.to(lse.dtype)
    done: list[tuple[Tensor, Tensor]] = []
    gone: Tensor | None = None
    for group in groups:
        weights = column_weights(call, group.keys, lse, selection)
        for keys, factor in done:
            weights = weights * _shared(group.indices(lse.device), keys, factor)
        factor = _broadcast(group.factor, weights)
        extra = weights * (factor - 1)
        norm = 1 + extra.sum(-1)
        if not (group.positive or (isinstance(group.factor, (int, float)) and group.factor > VANISHED)):
            empty = norm < VANISHED
            gone = empty if gone is None else gone | empty
            norm = norm.masked_fill(empty, 1.0)
        total = _added(total, extra, call.v[:, :, group.keys].to(lse.dtype)) / norm.transpose(1, 2)[..., None]
        lse = lse + norm.log()
        if len(groups) > 1:
            done.append((group.indices(lse.device), factor))
    if gone is not None:
        total = total.masked_fill(gone.transpose(1, 2)[..., None], 0.0)
        lse = lse.masked_fill(gone, -torch.inf)
    return total.to(out.dtype), lse


def _broadcast(factor: Factor, weights: Tensor) -> Tensor:
    """The factor as a tensor that broadcasts to `weights [B, Hq, Lq, n]`."""
    if callable(factor) and not isinstance(factor, Tensor):
        return factor(weights)
    if isinstance(factor, Tensor):
        factor = factor.to(weights.device, weights.dtype)
        return factor[:, None, None] if factor.dim() == 1 else factor
    return weights.new_full((), factor)


def _shared(keys: Tensor, earlier: Tensor, factor: Tensor) -> Tensor:
    """What earlier groups did to the columns `keys [n]`, given their columns `earlier [m]` and factor `[..., m|1]`."""
    same = (keys[:, None] == earlier).to(factor.dtype)
    return (
        1 + (factor - 1).expand(*factor.shape[:-1], len(earlier)) @ same.mT if factor.dim() else _number(same, factor)
    )


def _number(same: Tensor, factor: Tensor) -> Tensor:
    return 1 + (factor - 1) * same.sum(-1)


def _added(total: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    """`total [B, Lq, Hq, Dv]` plus `weights [B, Hq, Lq, n]` times `v [B, Hkv, n, Dv]`."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
    if v.shape[2] == 1:
        return torch.addcmul(total, weights.transpose(1, 2), v.transpose(1, 2))
    return total + (weights @ v).transpose(1, 2)


def initial_weight(call: AttentionCall, queries: int = 32) -> Tensor:
    """Dense attention `[B, Hq, n]` that up to `queries` queries of the call's later half pay to its first token."""
    at = torch.linspace(call.Lq // 2, call.Lq - 1, min(queries, call.Lq - call.Lq // 2), device=call.q.device).long()
    q = call.q[:, :, at].float().unflatten(1, (call.Hkv, call.groups))
    logits = (q @ (call.k.float() * call.scale)[:, :, None].mT).flatten(1, 2)
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if call.bias is not None:
        logits = logits + call.bias.float()[:, :, None]
    logits = logits.masked_fill(call.k_pos > call.q_pos[at, None], -torch.inf)
    lse = logits.logsumexp(-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.float()[:, None])
    return torch.exp(logits[..., 0] - lse)
