"""Where the parts of a problem are written: one output buffer, seen block by block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfpatch.ops.call import Problem
from hfpatch.ops.merge import Part, merge, mix


@dataclass(frozen=True)
class Output:
    """Buffers `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` and the sinks to be worked in when a block is written."""

    out: Tensor
    lse: Tensor
    sinks: Tensor | None

    @classmethod
    def of(cls, problem: Problem) -> "Output":
        """Uninitialised buffers for the problem: every query must be written exactly once."""
        b, hq, lq, _ = problem.q.shape
        out = problem.q.new_empty((b, lq, hq, problem.v.shape[-1]))
        lse = torch.empty((b, hq, lq), dtype=torch.float32, device=problem.q.device)
        return cls(out, lse, problem.sinks)

    def rows(self, start: int, stop: int) -> "Output":
        """The part of the buffers for queries `start..stop`."""
        return Output(self.out[:, start:stop], self.lse[:, :, start:stop], self.sinks)

    def batch(self, b: int) -> "Output":
        """The part of the buffers for batch row b."""
        return Output(self.out[b : b + 1], self.lse[b : b + 1], self.sinks)

    def blocks(self, n: int, heads: int) -> Part:
        """Views `[N, H, R, G, Dv]`, `[N, H, R, G]`, where N is the batch, or n query blocks of one batch row."""
        if n == 1:
            o, lse = self.out.unsqueeze(1), self.lse.unsqueeze(2)
        else:
            o, lse = self.out.unflatten(1, (n, -1)), self.lse.unflatten(2, (n, -1))
        o = o.unflatten(3, (heads, -1)).flatten(0, 1)
        lse = lse.unflatten(1, (heads, -1)).permute(0, 3, 1, 4, 2).flatten(0, 1)
        return o.transpose(1, 2), lse

    def write(self, parts: Sequence[Part], n: int = 1) -> None:
        """Merge parts `[N, H, R, G, Dv]`, `[N, H, R, G]` over disjoint keys into the buffers."""
        heads = parts[0][0].shape[1]
        dst_o, dst_lse = self.blocks(n, heads)
        sinks = None if self.sinks is None else self.sinks.view(heads, 1, -1)
        if len(parts) <= 2 and sinks is None and not any(t.requires_grad for part in parts for t in part):
            o, lse = parts[0] if len(parts) == 1 else mix(*parts)
        else:
            o, lse = merge(parts, sinks)
        dst_o.copy_(o)
        dst_lse.copy_(lse)


def blocked(q: Tensor, n: int, heads: int) -> Tensor:
    """`q [N0, Hq, n*R, D]` as `[N, H, R, G, D]`: N = batch for n = 1, else n blocks of one batch row."""
    q = q.unflatten(1, (heads, -1))
    if n == 1:
        return q.transpose(2, 3)
    return q[0].unflatten(2, (n, -1)).permute(2, 0, 3, 1, 4)
