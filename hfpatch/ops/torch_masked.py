"""Any selection, by its mask: a chunk of query rows at a time, over the keys some row of the chunk sees."""

import torch
from torch import Tensor

from hfpatch.core.row_mask import row_mask
from hfpatch.core.selection import Causal
from hfpatch.ops.call import Problem
from hfpatch.ops.torch_kernel import Kernel
from hfpatch.ops.torch_output import Output, blocked

CHUNK_ELEMENTS = 1 << 22
SPARSE_COLUMNS = 0.75


def run(problem: Problem, out: Output, kernel: Kernel) -> None:
    """Write the problem to `out`; memory is that of a chunk's mask, at most `Lq * Lk / 8` elements per mask head."""
    lq, lk = problem.at.Lq, problem.at.Lk
    heads = problem.at.B * problem.at.Hq
    step = max(16, min(256, CHUNK_ELEMENTS // (heads * lk), lq // 8))
    for start in range(0, lq, step):
        stop = min(start + step, lq)
        _rows(problem, start, stop, out.rows(start, stop), kernel)


def _rows(problem: Problem, start: int, stop: int, out: Output, kernel: Kernel) -> None:
    at, groups = problem.at.rows(start, stop), problem.groups
    q, k, v = problem.q[:, :, start:stop], problem.k[:, :, : at.Lk], problem.v[:, :, : at.Lk]
    bias = None if problem.bias is None else problem.bias[..., : at.Lk]
    i, j = at.positions()
    keep = (j <= i)[None, None]
    if not isinstance(problem.selection, Causal):
        keep = keep & row_mask(problem.selection, problem.at, start, stop)
        seen = keep.flatten(0, 2).any(0).nonzero()[:, 0]
        if seen.numel() < SPARSE_COLUMNS * at.Lk:
            k, v, keep = (t.index_select(d, seen) for t, d in ((k, 2), (v, 2), (keep, 3)))
            bias = None if bias is None else bias.index_select(2, seen)
    mask = additive(keep, bias, q)
    mask = mask.unflatten(1, (at.Hkv, groups) if mask.shape[1] > 1 else (1, 1)).transpose(2, 3)
    out.write([kernel(blocked(q, 1, at.Hkv), k, v, mask)])


def additive(keep: Tensor, bias: Tensor | None, q: Tensor) -> Tensor:
    """Mask `[B|1, Hq|1, R, C]` to add to logits: -inf where not kept, plus the bias `[B|1, Hq|1, C]`."""
    if bias is not None:
        return torch.where(keep, bias.float()[:, :, None], -torch.inf)
    return q.new_zeros(keep.shape).masked_fill_(~keep, -torch.inf)
