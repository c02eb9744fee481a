"""Lists of key blocks per query block: gathered per block, the partly visible ones exact to the token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfpatch.core.selection import BlockMap
from hfpatch.ops import torch_block_decode
from hfpatch.ops.call import Problem
from hfpatch.ops.gather import RowGather, take
from hfpatch.ops.merge import Part
from hfpatch.ops.torch_kernel import Kernel, lse_of_nothing
from hfpatch.ops.torch_output import Output, blocked

CHUNK_KEYS = 1 << 14


@dataclass(frozen=True)
class Plan:
    """A `BlockMap` put in order: per query block the key blocks before it first, then the partly visible ones.

    `own [nQ]`: whether the latter are exactly the query block's own tokens, for all rows and heads; empty unless asked
    for, since it is read from the device.
    """

    order: Tensor
    full: Tensor
    partial: Tensor
    own: list[bool]

    @classmethod
    def of(cls, sel: BlockMap, problem: Problem, heads: int, own: bool = False) -> "Plan":
        """`order [B|1, heads, nQ, K]`, number of `full` and `partial` blocks `[B|1, heads, nQ]`."""
        at, idx = problem.at, sel.indices.long()
        nq = -(-at.Lq // sel.block_q)
        idx, listed = idx[:, :, :nq], sel.listed()[:, :, :nq]
        first = at.off + torch.arange(nq, device=idx.device)[:, None] * sel.block_q
        last = (first + sel.block_q).clamp(max=at.Lk) - 1
        full = listed & ((idx + 1) * sel.block_k <= first)
        partial = listed & ~full & (idx * sel.block_k <= last)
        rank = 2 - 2 * full.to(torch.int8) - partial.to(torch.int8)
        sorted_already = idx.device.type == "cpu" and bool((rank[..., 1:] >= rank[..., :-1]).all())
        order = idx if sorted_already else idx.gather(-1, rank.argsort(dim=-1, stable=True))
        count, told = partial.sum(-1), []
        if own:
            inside = count * sel.block_k == (last - first + 1)[:, 0]
            begins = torch.where(partial, idx * sel.block_k, at.Lk).amin(-1) == first[:, 0]
            told = (inside & begins).all(0).all(0).tolist()
        order, full, count = (t.expand(-1, heads, *t.shape[2:]) for t in (order, full.sum(-1), count))
        return cls(order, full, count, told)


def run(problem: Problem, out: Output, kernel: Kernel) -> None:
    """Write attention over a `BlockMap` to `out`."""
    sel, at = problem.selection, problem.at
    if not isinstance(sel, BlockMap):
        raise TypeError(f"expected a BlockMap, not {type(sel).__name__}")
    sel = sel.fitted(at)
    if at.Lq == 1 and problem.bias is None:
        return torch_block_decode.run(problem, sel, out, kernel)
    heads = at.Hq if sel.indices.shape[1] == at.Hq else at.Hkv
    work = _Work(problem, sel, kernel, Plan.of(sel, problem, heads, own=True), heads)
    chunk = max(1, CHUNK_KEYS // max(1, sel.indices.shape[-1] * sel.block_k * heads))
    whole = at.Lq // sel.block_q
    for b in range(at.B):
        for n0 in range(0, whole, chunk):
            n1 = min(n0 + chunk, whole)
            rows = slice(n0 * sel.block_q, n1 * sel.block_q)
            out.batch(b).rows(rows.start, rows.stop).write(work.parts(b, n0, n1, rows), n1 - n0)
        if whole * sel.block_q < at.Lq:
            rows = slice(whole * sel.block_q, at.Lq)
            out.batch(b).rows(rows.start, rows.stop).write(work.parts(b, whole, whole + 1, rows))


class _Work:
    """Gathers keys and runs the kernel for query blocks `n0..n1` of one batch row."""

    def __init__(self, problem: Problem, sel: BlockMap, kernel: Kernel, plan: Plan, heads: int) -> None:
        self.p, self.sel, self.kernel, self.plan, self.heads = problem, sel, kernel, plan, heads
        self.k, self.v = RowGather.of(problem.k), RowGather.of(problem.v)
        device = problem.q.device
        self.inner = torch.arange(sel.block_k, device=device)
        self.all_heads = torch.arange(heads, device=device)[:, None]
        self.kv_head = torch.arange(heads, device=device) * problem.at.Hkv // heads
        self.full, self.partial = plan.full.tolist(), plan.partial.tolist()
        self.causal = kernel.fused is not None and problem.bias is None

    def parts(self, b: int, n0: int, n1: int, rows: slice) -> list[Part]:
        """Parts `[N, H, R, G, Dv]` of query blocks `n0..n1`, queries `rows`."""
        row = b if len(self.full) > 1 else 0
        q = blocked(self.p.q[b : b + 1, :, rows], n1 - n0, self.heads)
        order = self.plan.order[row, :, n0:n1].transpose(0, 1)
        full = [c for h in self.full[row] for c in h[n0:n1]]
        widest = max(c for h in self.partial[row] for c in h[n0:n1])
        parts = []
        own = self.causal and all(self.plan.own[n0:n1])
        if max(full) > 0 and min(full) == max(full):
            parts.append(self._full(b, q, order[..., : full[0]], self.all_heads))
        elif max(full) > 0:
            parts.append(self._uneven(b, q, order, self.plan.full[row, :, n0:n1].t()))
        first = self.p.at.off + rows.start
        if own:
            parts.append(self._own(b, q, first))
        elif widest or not parts:
            parts.append(self._partial(b, row, q, order, n0, n1, max(widest, 1), first))
        return parts

    def _full(self, b: int, q: Tensor, blocks: Tensor, h: Tensor) -> Part:
        """All of the key blocks `[N, H, c]` of heads `h`, unmasked."""
        tokens = (blocks[..., None] * self.sel.block_k + self.inner).flatten(-2)
        return self._tokens(b, q, tokens, h, None)

    def _tokens(self, b: int, q: Tensor, tokens: Tensor, h: Tensor, mask: Tensor | None) -> Part:
        """Attention over `tokens [N, H, C]` of heads `h`, under an additive mask and the column bias."""
        kv = self.kv_head[h]
        bias = self._bias(b, h, tokens)
        if bias is not None:
            mask = bias if mask is None else mask + bias
        return self.kernel(q, *take(self.k, self.v, b, kv, tokens), mask)

    def _uneven(self, b: int, q: Tensor, order: Tensor, counts: Tensor) -> Part:
        """Key blocks where every (query block, head) has its own number of them: one kernel call per number."""
        o = q.new_zeros((*q.shape[:4], self.p.v.shape[-1]))
        lse = lse_of_nothing(q)
        for c in counts.unique().tolist():
            if c:
                n, h = (counts == c).nonzero(as_tuple=True)
                part = self._full(b, q[n, h][:, None], order[n, h, :c][:, None], h[:, None, None])
                o[n, h], lse[n, h] = part[0][:, 0].to(o.dtype), part[1][:, 0]
        return o, lse

    def _own(self, b: int, q: Tensor, first: int) -> Part:
        """The query blocks' own tokens, which begin at `first`: nothing to gather, and no mask."""
        n, h, r, g, _ = q.shape
        k, v = (
            x[b, :, first : first + n * r][self.kv_head].unflatten(1, (n, r)).transpose(0, 1).flatten(0, 1)
            for x in (self.p.k, self.p.v)
        )
        wide, heads = q.transpose(2, 3).flatten(0, 1), 1 if self.kernel.grouped else g
        o, lse = self.kernel.causal(wide, *(x[:, None].expand(-1, heads, -1, -1) for x in (k, v)))
        return o.unflatten(0, (n, h)).transpose(2, 3), lse.unflatten(0, (n, h)).transpose(2, 3)

    def _partial(self, b: int, row: int, q: Tensor, order: Tensor, n0: int, n1: int, c: int, first: int) -> Part:
        """Key blocks cut by causality, masked token by token."""
        counts = self.plan.full[row, :, n0:n1].t()[..., None]
        slot = counts + torch.arange(c, device=q.device)
        valid = torch.arange(c, device=q.device) < self.plan.partial[row, :, n0:n1].t()[..., None]
        blocks = order.gather(-1, slot.clamp(max=order.shape[-1] - 1))
        tokens = (blocks[..., None] * self.sel.block_k + self.inner).flatten(-2)
        shown = torch.where(valid.repeat_interleave(self.sel.block_k, -1), tokens, self.p.at.Lk)
        r = q.shape[2]
        i = first + torch.arange((n1 - n0) * r, device=q.device).view(n1 - n0, 1, r, 1)
        keep = (shown[:, :, None] <= i)[:, :, :, None]
        mask = q.new_zeros(keep.shape).masked_fill_(~keep, -torch.inf)
        return self._tokens(b, q, tokens.clamp(0, self.p.at.Lk - 1), self.all_heads, mask)

    def _bias(self, b: int, h: Tensor, tokens: Tensor) -> Tensor | None:
        """The column bias of the tokens, `[N, H, 1, G|1, C]`."""
        if self.p.bias is None:
            return None
        bias = self.p.bias[b if self.p.bias.shape[0] > 1 else 0].float()
        if bias.shape[0] == 1:
            return bias[0][tokens][:, :, None, None]
        bias = bias.unflatten(0, (self.heads, -1))
        g = torch.arange(bias.shape[1], device=bias.device)[:, None]
        return bias[h[..., None], g, tokens[:, :, None]][:, :, None]
