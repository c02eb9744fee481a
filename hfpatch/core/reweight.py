"""Reweighting softmax weights after the fact, exact on top of any executor."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .call import AttentionCall
from .selection import Causal, Selection

CANCELLING = 0.3
CHUNK_ELEMENTS = 1 << 22
LOG_SPARE = 1024
Factor = float | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Columns:
    """Different key columns `keys` and the factor on their softmax weights.

    `keys`: a tensor `[n]`, or a slice with start and stop. `factor`: a number, `[Hq]`, a tensor that broadcasts
    to `[B, Hq, Lq, n]`, or a function from the weights `[B, Hq, R, n]` of some queries before this regroup to such
    a tensor. `positive`: known never to take nearly all of a query's weight, which saves looking for such queries.
    """

    keys: Tensor | slice
    factor: Factor
    positive: bool = False

    @cached_property
    def inverse(self) -> tuple[Tensor, Tensor]:
        """`1 / (factor - 1)` of a factor `[Hq]`, as `[Hq, 1]`, and a one of its kind."""
        assert isinstance(self.factor, Tensor)
        return (self.factor - 1).reciprocal()[:, None], self.factor.new_ones(())

    def log(self, length: int) -> Tensor:
        """The log of a factor `[Hq]` on key 0 as a bias `[Hq, length]`, `[1, length]` where all are equal."""
        cut: Tensor | None = self.__dict__.get("_cut")  # all layers of a step ask for the same length
        if cut is None or cut.shape[1] != length:
            made: Tensor | None = self.__dict__.get("_log")
            if made is None or made.shape[1] < length:
                assert isinstance(self.factor, Tensor)
                factor = self.factor if bool((self.factor != self.factor[0]).any()) else self.factor[:1]
                made = torch.zeros(len(factor), length + LOG_SPARE, device=factor.device)
                made[:, 0] = factor.log()
            cut = made.narrow(1, 0, length)
            self.__dict__.update(_log=made, _cut=cut)
        return cut

    @cached_property
    def first(self) -> bool:
        """Whether this is a positive factor per head, a constant, on the first key."""
        fixed = isinstance(self.factor, Tensor) and self.factor.dim() == 1 and not self.factor.requires_grad
        return fixed and self.positive and self.keys == slice(0, 1)

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
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    groups: list[Columns],
    selection: Selection | None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Multiply the softmax weights of each column group by its factor and renormalise, one group after the other.

    `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]`; a sink logit keeps factor 1. Groups may share columns: each sees the
    weights the earlier ones left. With weights w and factors f on columns C:
    out' = (out + sum_C (f - 1) w v) / (1 + sum_C (f - 1) w).
    Queries left with so little of their weight that the difference loses digits are computed again from all keys;
    one left with nothing gets out 0, lse -inf. Without `with_lse` the lse given back may be the old one.
    """
    if len(groups) == 1 and call.Lq == 1 and groups[0].positive:
        fast = _first_key(call, out, lse, groups[0], selection, with_lse)
        if fast is not None:
            return fast
    total = out.to(lse.dtype)
    done: list[tuple[Tensor, Tensor]] = []
    left: Tensor | None = None
    for group in groups:
        weights = column_weights(call, group.keys, lse, selection)
        for keys, factor in done:
            weights = weights * _shared(group.indices(lse.device), keys, factor)
        factor = _broadcast(group.factor, weights)
        extra = weights * (factor - 1)
        norm = 1 + extra.sum(-1)
        if not (group.positive or (isinstance(group.factor, (int, float)) and group.factor > CANCELLING)):
            left = norm if left is None else left * norm
        total = _moved(total, extra, norm, call.v[:, :, group.keys].to(lse.dtype))
        lse = lse + norm.log()
        if len(groups) > 1:
            done.append((group.indices(lse.device), factor))
    if left is not None:
        rows = (left > CANCELLING).logical_not().flatten(0, 1).any(0).nonzero()[:, 0]
        for some in rows.split(max(1, CHUNK_ELEMENTS // (call.B * call.Hq * call.Lk))):
            total[:, some], lse[:, :, some] = _from_all_keys(call, some, groups, selection, lse.dtype)
    return total.to(out.dtype), lse


def _first_key(
    call: AttentionCall, out: Tensor, lse: Tensor, group: Columns, selection: Selection | None, with_lse: bool
) -> tuple[Tensor, Tensor] | None:
    """`regroup` of the first key by a positive factor per head, for one query on dense attention; None for others.

    With w = exp(logit - lse) the key's share of the result is (f - 1) w / (1 + (f - 1) w), here written as
    1 / (1 + exp(lse - logit) / (f - 1)): at one query the number of steps costs more than the arithmetic.
    """
    plain = selection is None and call.softcap is None and call.bias is None
    if not plain or not group.first or lse.requires_grad:
        return None
    (b, hq, _, d), (_, hkv, _, dv), dtype = call.q.shape, call.v.shape, lse.dtype
    n, g = b * hkv, hq // hkv
    q, k, v, o = call.q, call.k.select(2, 0), call.v.select(2, 0), out
    if q.dtype != dtype:
        q, k, v, o = q.to(dtype), k.to(dtype), v.to(dtype), o.to(dtype)
    power = torch.baddbmm(lse.view(n, g, 1), q.reshape(n, g, d), k.reshape(n, d, 1), alpha=-call.scale).exp_()
    inverse, one = group.inverse
    total = torch.addcmul(one, power.view(b, hq, 1), inverse)
    share = total.reciprocal_().view(n, g, 1)
    moved = torch.lerp(o.view(n, g, dv), v.reshape(n, 1, dv), share).view(b, 1, hq, dv)
    if with_lse:
        lse = lse + (power.view(b, hq, 1) * inverse).reciprocal_().log1p_()
    return moved if moved.dtype == out.dtype else moved.to(out.dtype), lse


def _from_all_keys(
    call: AttentionCall, rows: Tensor, groups: list[Columns], selection: Selection | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Reweighted `out [B, R, Hq, Dv]`, `lse [B, Hq, R]` of the queries `rows [R]` by their whole rows of weights."""
    exact = torch.float64 if call.q.device.type != "mps" else torch.float32
    k, v = (t.to(exact).repeat_interleave(call.groups, dim=1) for t in (call.k, call.v))
    logits = call.scale * call.q[:, :, rows].to(exact) @ k.mT
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if call.bias is not None:
        logits = logits + call.bias.to(exact)[:, :, None]
    seen = (selection or Causal()).mask(call.layout)[:, :, rows]
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.to(exact)[:, None])
    weights = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    rest = 1 - weights.sum(-1) if call.sinks is not None else torch.zeros_like(lse)
    for group in groups:
        columns = group.indices(rows.device)
        factor = _broadcast(group.factor, weights[..., columns])
        if factor.dim() > 1 and factor.shape[-2] == call.Lq > 1:
            factor = factor[..., rows, :]
        weights = weights.index_copy(-1, columns, weights[..., columns] * factor)
        norm = weights.sum(-1) + rest
        weights, rest = weights / norm[..., None], rest / norm
        lse = lse + norm.log()
    weights = weights.masked_fill(lse.isneginf()[..., None], 0.0)
    return (weights @ v).transpose(1, 2).to(dtype), lse.to(dtype)


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


def _moved(total: Tensor, extra: Tensor, norm: Tensor, v: Tensor) -> Tensor:
    """`(total + extra v) / norm`: `total [B, Lq, Hq, Dv]`, `extra [B, Hq, Lq, n]`, `norm` its row sums plus one."""
    v = v.repeat_interleave(extra.shape[1] // v.shape[1], dim=1)
    norm = norm.transpose(1, 2)[..., None]
    if v.shape[2] == 1:
        return torch.lerp(total, v.transpose(1, 2), extra.transpose(1, 2) / norm)
    return (total + (extra @ v).transpose(1, 2)) / norm


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
