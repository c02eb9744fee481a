"""First and last tokens: blocks of queries over overlapping views of the keys, exact to the token."""

import torch
from torch import Tensor

from hfpatch.core.selection import Causal, SinkWindow
from hfpatch.ops import torch_causal, torch_masked
from hfpatch.ops.call import Problem
from hfpatch.ops.merge import Part
from hfpatch.ops.torch_kernel import Kernel
from hfpatch.ops.torch_output import Output, blocked

BLOCK_ROWS = 256
CHUNK_QUERIES = 1024


def run(problem: Problem, out: Output, kernel: Kernel) -> None:
    """Write attention over a `SinkWindow` to `out`."""
    sel, at = problem.selection, problem.at
    if not isinstance(sel, SinkWindow) or sel.window < 1 or sel.sink < 0:
        return torch_masked.run(problem, out, kernel)
    dense = min(max(sel.sink + sel.window - at.off, 0), at.Lq)
    if dense:
        torch_causal.run(problem.rows(0, dense, Causal()), out.rows(0, dense), kernel)
    block = block_size(problem.groups, sel.window)
    chunk = max(1, CHUNK_QUERIES // block) * block
    for b in range(at.B):
        start = dense
        while start < at.Lq:
            stop = min(start + chunk, at.Lq)
            whole = (stop - start) // block
            n, stop = (whole, start + whole * block) if whole else (1, stop)
            parts = _blocks(problem, sel, b, start, stop, n, kernel)
            out.batch(b).rows(start, stop).write(parts, n)
            start = stop


def block_size(groups: int, window: int) -> int:
    """Queries per block: enough rows per product, few keys beyond the window."""
    return max(16, min(BLOCK_ROWS // groups, max(64, window // 8)))


def _blocks(p: Problem, sel: SinkWindow, b: int, start: int, stop: int, n: int, kernel: Kernel) -> list[Part]:
    """The keys every query of a block sees, and the rest: sink, left edge and diagonal, under one small mask.

    A single query sees all of them: one part.
    """
    rows, first = (stop - start) // n, p.at.off + start
    q = blocked(p.q[b : b + 1, :, start:stop], n, p.at.Hkv)
    k, v = p.k[b], p.v[b]
    bias = None if p.bias is None else p.bias[b if p.bias.shape[0] > 1 else 0]
    common = max(0, sel.window - rows)
    low, mid = first - sel.window + 1, first + rows - sel.window
    sink = [(0, 0, sel.sink)] * (sel.sink > 0)
    if rows == 1:
        return [_part(q, k, v, bias, [*sink, (low, rows, sel.window)], n, kernel, None)]
    edges = [(low, mid - low), (first, rows)] if common else [(low, first + rows - low)]
    spans = sink + [(s, rows, size) for s, size in edges if size]
    parts = [_part(q, k, v, bias, spans, n, kernel, _edge_mask(q, first, sel, edges))]
    if common:
        parts.append(_part(q, k, v, bias, [(mid, rows, common)], n, kernel, None))
    return parts


def _part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    spans: list[tuple[int, int, int]],
    n: int,
    kernel: Kernel,
    mask: Tensor | None,
) -> Part:
    """Attention over `(start, step, size)` spans of keys, put next to each other for every block."""
    if bias is not None:
        grouped = bias.float().unflatten(0, (k.shape[0], -1) if bias.shape[0] > 1 else (1, 1))
        columns = joined(grouped.flatten(0, 1)[..., None], spans, n)[..., 0]
        columns = columns.unflatten(1, grouped.shape[:2])[:, :, None]
        mask = columns if mask is None else mask + columns
    return kernel(q, joined(k, spans, n), joined(v, spans, n), mask)


def joined(t: Tensor, spans: list[tuple[int, int, int]], n: int) -> Tensor:
    """`t [H, L, D]` as `[n, H, C, D]`: block m takes rows `start + m*step ..` of each span; a view for one span."""
    views = []
    for start, step, size in spans:
        h, row, d = t.stride()
        view = t[:, start:].as_strided(
            (n, t.shape[0], size, t.shape[2]), (step * row, h, row, d), t.storage_offset() + start * row
        )
        views.append(view)
    return views[0] if len(views) == 1 else torch.cat(views, dim=2)


def _edge_mask(q: Tensor, first: int, sel: SinkWindow, edges: list[tuple[int, int]]) -> Tensor:
    """Additive `[1, 1, R, 1, C]` of one block, the same for all."""
    rows = q.shape[2]
    i = torch.arange(first, first + rows, device=q.device)[:, None]
    j = torch.cat([torch.arange(s, s + size, device=q.device) for s, size in edges])[None]
    keep = (j <= i) & (i - j < sel.window)
    keep = torch.cat([keep.new_ones(rows, sel.sink), keep], dim=1)
    return q.new_zeros(keep.shape).masked_fill_(~keep, -torch.inf)[None, None, :, None]
