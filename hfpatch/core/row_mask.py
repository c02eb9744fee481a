"""The mask of some query rows of a selection, without writing out the others."""

import torch
from torch import Tensor

from .selection import BlockMap, Both, Causal, Layout, Predicate, Rows, Selection, SinkWindow


def row_mask(sel: Selection, at: Layout, start: int, stop: int) -> Tensor:
    """`sel.mask(at)[:, :, start:stop, : at.off + stop]`, bool `[B|1, Hq|1, R, C]`.

    A selection of a class unknown here is written out whole and cut.
    """
    part = at.rows(start, stop)
    if isinstance(sel, Both):
        return row_mask(sel.first, at, start, stop) & row_mask(sel.second, at, start, stop)
    if isinstance(sel, BlockMap):
        return _blocks(sel, at, start, stop)
    if isinstance(sel, Rows):
        return _ranges(sel, at, start, stop)
    if isinstance(sel, (Causal, SinkWindow, Predicate)):
        return sel.mask(part)
    return sel.mask(at)[:, :, start:stop, : part.Lk]


def _blocks(sel: BlockMap, at: Layout, start: int, stop: int) -> Tensor:
    first, last = start // sel.block_q, -(-stop // sel.block_q)
    some = BlockMap(sel.indices[:, :, first:last], sel.counts[:, :, first:last], sel.block_q, sel.block_k)
    i, j = at.rows(start, stop).positions()
    block = torch.arange(start, stop, device=at.device) // sel.block_q - first
    keep = some.block_mask(at).index_select(2, block).index_select(3, j[0] // sel.block_k) & (j <= i)
    return keep.repeat_interleave(at.Hq // keep.shape[1], dim=1) if keep.shape[1] > 1 else keep


def _ranges(sel: Rows, at: Layout, start: int, stop: int) -> Tensor:
    masks, width = [], at.off + stop
    for a, b, part in sel.ranges(at):
        low, high = max(a, start), min(b, stop)
        if low < high:
            m = row_mask(part, at.rows(a, b), low - a, high - a)
            masks.append(torch.nn.functional.pad(m, (0, width - m.shape[3])))
    rows, heads = max(m.shape[0] for m in masks), max(m.shape[1] for m in masks)
    return torch.cat([m.expand(rows, heads, *m.shape[2:]) for m in masks], dim=2)
