"""One query per row and a list of key blocks: one gather and one kernel call for the whole batch."""

import torch

from hfpatch.core.selection import BlockMap
from hfpatch.ops.call import Problem
from hfpatch.ops.gather import RowGather, take
from hfpatch.ops.torch_kernel import Kernel
from hfpatch.ops.torch_output import Output, blocked


def run(problem: Problem, sel: BlockMap, out: Output, kernel: Kernel) -> None:
    """Write attention of `q [B, Hq, 1, D]` over the listed blocks to `out`; without a bias."""
    at, device = problem.at, problem.q.device
    heads = at.Hq if sel.indices.shape[1] == at.Hq else at.Hkv
    tokens, keep = sel.indices[:, :, 0].long(), sel.listed()[:, :, 0]
    if sel.block_k > 1:
        tokens = (tokens[..., None] * sel.block_k + torch.arange(sel.block_k, device=device)).flatten(-2)
        keep = keep.repeat_interleave(sel.block_k, -1)
    keep = keep & (tokens < at.Lk)
    mask = None
    if not bool(keep.all()):
        tokens = tokens.clamp(0, at.Lk - 1)
        mask = problem.q.new_zeros(keep.shape).masked_fill_(~keep, -torch.inf)[:, :, None, None]
    tokens = tokens.expand(at.B, heads, -1)
    b = torch.arange(at.B, device=device)[:, None, None]
    h = (torch.arange(heads, device=device) * at.Hkv // heads)[:, None]
    k, v = take(RowGather.of(problem.k), RowGather.of(problem.v), b, h, tokens)
    out.write([kernel(blocked(problem.q, 1, heads), k, v, mask)])
