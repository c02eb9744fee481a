"""Reweighting softmax weights after the fact, exact on top of any executor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import AttentionCall
from .logits import biased, capped, causal, log_sum, logits, weights
from .selection import Causal, Selection

CANCELLING = 0.3
CHUNK_ELEMENTS = 1 << 22
LOG_SPARE = 1024
Factor = float | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Columns:
    """Different key columns `keys` and the factor on their softmax weights.

    `keys`: a tensor `[n]`, or a slice with start and stop. `factor`: a number, `[Hq]`, a tensor that broadcasts
    to `[B, Hq, Lq, n]`, or a function from the weights `[B, Hq, R, n]` of some queries before it to such
    a tensor. `positive`: known never to take nearly all of a query's weight, which saves looking for such queries.
    """

    keys: Tensor | slice
    factor: Factor
    positive: bool = False

    @property
    def constant(self) -> bool:
        """Whether this is a positive factor per head that never changes: a bias of its log on the logits."""
        return self.positive and isinstance(self.factor, Tensor) and self.factor.dim() == 1

    @property
    def head_logs(self) -> Tensor:
        """The logs `[Hq]` of a `constant` factor."""
        assert isinstance(self.factor, Tensor) and self.constant, "in a graph factors are constant, one per head"
        return self.factor.log().float()

    def among(self, at: Tensor) -> Tensor:
        """Which of the positions `at` are among the columns, a bool of its shape."""
        if isinstance(self.keys, slice):
            return (at >= self.keys.start) & (at < self.keys.stop)
        return torch.isin(at, self.keys)

    def log(self, length: int) -> Tensor:
        """The log of a `constant` factor as a bias `[1, Hq, length]`, `[1, 1, length]` where all heads are equal."""
        assert isinstance(self.factor, Tensor)
        if self.factor.requires_grad:
            return self._log(self.factor, length)
        cut: Tensor | None = self.__dict__.get("_cut")  # all layers of a step ask for the same length
        if cut is None or cut.shape[2] != length:
            made: Tensor | None = self.__dict__.get("_made")
            if made is None or made.shape[2] < length:
                with torch.inference_mode(False), torch.no_grad():  # a later call may be one of training
                    same = not bool((self.factor != self.factor[0]).any())
                    made = self._log(self.factor[:1] if same else self.factor, length + LOG_SPARE)
            cut = made.narrow(2, 0, length)
            self.__dict__.update(_made=made, _cut=cut)
        return cut

    def _log(self, factor: Tensor, length: int) -> Tensor:
        columns = self.indices(factor.device)
        bias = torch.zeros(len(factor), length, device=factor.device)
        return bias.index_add(1, columns, factor.log().float()[:, None].expand(-1, len(columns)))[None]

    def indices(self, device: torch.device) -> Tensor:
        """The columns as a tensor `[n]`."""
        if isinstance(self.keys, slice):
            return torch.arange(self.keys.start, self.keys.stop, device=device)
        return self.keys.to(device)


def column_weights(call: AttentionCall, keys: Tensor | slice, lse: Tensor, selection: Selection | None) -> Tensor:
    """Softmax weights `[B, Hq, Lq, n]` in lse's dtype of the key columns `keys`, given `lse [B, Hq, Lq]`."""
    q = call.q.to(lse.dtype).unflatten(1, (call.Hkv, call.groups))
    k = call.k[:, :, None, keys].to(lse.dtype)
    products = (q * (k * call.scale)).sum(-1, keepdim=True) if k.shape[3] == 1 else q @ (k * call.scale).mT
    column = biased(capped(products.flatten(1, 2), call.softcap), None if call.bias is None else call.bias[..., keys])
    share = torch.exp(column - lse[..., None])
    dense = selection is None or isinstance(selection, Causal)
    if dense and isinstance(keys, slice) and keys.stop <= call.off + 1:
        return share
    columns = Columns(keys, 1.0).indices(lse.device)
    seen = (selection or Causal()).mask(call.layout, columns)
    return torch.where(seen & torch.isfinite(lse)[..., None], share, 0.0)


def as_bias(call: AttentionCall, groups: list[Columns]) -> tuple[Tensor | None, list[Columns]]:
    """The call's bias with the leading constant factors in it, and the groups that are left.

    Later constants stay: what comes before them may look at the weights as they are without.
    """
    bias, n = call.bias, 0
    while n < len(groups) and groups[n].constant:
        more = groups[n].log(call.Lk)
        bias, n = more if bias is None else bias + more, n + 1
    return bias, groups[n:]


def reweight(
    call: AttentionCall, out: Tensor, lse: Tensor, groups: list[Columns], selection: Selection | None
) -> tuple[Tensor, Tensor]:
    """Multiply the softmax weights of each column group by its factor and renormalise, one group after the other.

    `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]`; a sink logit keeps factor 1. Groups may share columns: each sees the
    weights the earlier ones left. With weights w and factors f on columns C:
    out' = (out + sum_C (f - 1) w v) / (1 + sum_C (f - 1) w).
    Queries left with so little of their weight that the difference loses digits are computed again from all keys;
    one left with nothing gets out 0, lse -inf. On a GPU, which a look for such queries would wait for, the one of a
    decode step is always worked out from its whole row of weights.
    """
    if call.Lq == 1 and call.q.device.type != "cpu" and not all(map(_harmless, groups)):
        return _from_all_keys(call, slice(None), groups, selection, torch.float32, lse.dtype, out.dtype)
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
        if not _harmless(group):
            left = norm if left is None else left * norm
        total = _moved(total, extra, norm, call.v[:, :, group.keys].to(lse.dtype))
        lse = lse + norm.log()
        if len(groups) > 1:
            done.append((group.indices(lse.device), factor))
    if left is not None:
        rows = (left > CANCELLING).logical_not().flatten(0, 1).any(0).nonzero()[:, 0]
        exact = torch.float64 if call.q.device.type != "mps" else torch.float32
        for some in rows.split(max(1, CHUNK_ELEMENTS // (call.B * call.Hq * call.Lk))):
            found = _from_all_keys(call, some, groups, selection, exact, lse.dtype, total.dtype)
            total[:, some], lse[:, :, some] = found
    return total.to(out.dtype), lse


def _harmless(group: Columns) -> bool:
    """Whether the group can leave no query with so little of its weight that digits are lost."""
    return group.positive or (isinstance(group.factor, (int, float)) and group.factor > CANCELLING)


def _from_all_keys(
    call: AttentionCall,
    rows: Tensor | slice,
    groups: list[Columns],
    selection: Selection | None,
    exact: torch.dtype,
    lse_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Reweighted `out [B, R, Hq, Dv]`, `lse [B, Hq, R]` of the queries `rows [R]` by their whole rows of weights."""
    q, k, v = call.q[:, :, rows].to(exact), call.k.to(exact), call.v.to(exact).repeat_interleave(call.groups, dim=1)
    every = logits(q, k, scale=call.scale, softcap=call.softcap, bias=call.bias)
    seen = (selection or Causal()).mask(call.layout)[:, :, rows]
    every = every.masked_fill(~seen, -torch.inf)
    lse = log_sum(every, call.sinks)
    weights = torch.exp(every - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    rest = 1 - weights.sum(-1) if call.sinks is not None else torch.zeros_like(lse)
    for group in groups:
        columns = group.indices(lse.device)
        factor = _broadcast(group.factor, weights[..., columns])
        if factor.dim() > 1 and factor.shape[-2] == call.Lq > 1:
            factor = factor[..., rows, :]
        weights = weights.index_copy(-1, columns, weights[..., columns] * factor)
        norm = weights.sum(-1) + rest
        weights, rest = weights / norm[..., None], rest / norm
        lse = lse + norm.log()
    weights = weights.masked_fill(lse.isneginf()[..., None], 0.0)
    return (weights @ v).transpose(1, 2).to(dtype), lse.to(lse_dtype)


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
    q, k = call.q[:, :, at].float(), call.k.float()
    every = causal(logits(q, k, scale=call.scale, softcap=call.softcap, bias=call.bias), call.q_pos[at], call.k_pos)
    return weights(every, call.sinks)[..., 0]
