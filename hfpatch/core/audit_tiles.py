"""The mass that a tile of queries keeps, and what the best choice of as many key blocks would keep: its oracle."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .audit_rows import row_logits, with_sinks
from .call import AttentionCall
from .row_mask import row_mask
from .selection import BlockMap, Both, Causal, Predicate, Rows, Selection, SinkWindow


@dataclass(frozen=True)
class Tile:
    """Queries `start..stop` that share a choice: `keep` bool `[B|1, H, n]` of blocks of `size` keys.

    `free` tells whether other blocks could have been chosen.
    """

    start: int
    stop: int
    keep: Tensor
    size: int
    free: bool


def is_fixed(selection: Selection) -> bool:
    """Whether a selection goes by positions alone, so that there is nothing to choose."""
    if isinstance(selection, Both):
        return is_fixed(selection.first) and is_fixed(selection.second)
    if isinstance(selection, Rows):
        return all(is_fixed(part) for _, part in selection.parts)
    return isinstance(selection, (Causal, SinkWindow, Predicate))


def tile_of(call: AttentionCall, selection: Selection, query: int) -> Tile:
    """The tile that holds a query; of a selection that is no block map, the query alone and single keys."""
    at, start, stop, part = call.layout, 0, call.Lq, selection
    if isinstance(selection, Rows):
        start, stop, part = next(r for r in selection.ranges(at) if r[0] <= query < r[1])
    inner = at.rows(start, stop)
    if isinstance(part, BlockMap):
        n = (query - start) // part.block_q
        first = start + n * part.block_q
        one = BlockMap(part.indices[:, :, n : n + 1], part.counts[:, :, n : n + 1], part.block_q, part.block_k)
        keep = one.block_mask(inner)[:, :, 0]
        return Tile(first, min(first + part.block_q, stop), keep, part.block_k, True)
    keep = row_mask(part, inner, query - start, query - start + 1)[:, :, 0]
    return Tile(query, query + 1, keep, 1, not is_fixed(part))


def tile_masses(call: AttentionCall, selection: Selection, query: int) -> tuple[Tensor, Tensor]:
    """Dense mass `[B, H]` that the tile of a query keeps, and what as many of the best blocks would keep.

    The share of a sink logit is kept in any case.
    """
    tile = tile_of(call, selection, query)
    mass, always = block_masses(call.first(tile.stop), tile)
    kept = (mass * tile.keep).sum(-1) + always
    if not tile.free:
        return kept, kept
    seen = -(-(call.off + tile.stop) // tile.size)
    count = tile.keep[..., :seen].sum(-1).expand(call.B, -1)
    ranked = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    best = ranked.gather(2, (count - 1).clamp_min(0)[..., None])[..., 0].masked_fill(count == 0, 0.0)
    return kept, best + always


def block_masses(call: AttentionCall, tile: Tile) -> tuple[Tensor, Tensor]:
    """Mean dense mass `[B, H, n]` of the key blocks of a tile, the call's last, and `[B, H]` of its sink logits."""
    heads, blocks = tile.keep.shape[1:]
    rows = torch.arange(tile.start, tile.stop, device=call.q.device)
    mass = call.q.new_zeros((call.B, heads, blocks), dtype=torch.float32)
    at = (torch.arange(call.Lk, device=call.q.device) // tile.size).expand(call.B, heads, -1)
    for logits in row_logits(call, rows):
        weights = logits.softmax(-1)
        if call.sinks is not None:
            lse = logits.logsumexp(-1)
            weights = weights * torch.exp(lse - with_sinks(call, lse))[..., None]
        mass.scatter_add_(2, at, weights.unflatten(1, (heads, -1)).sum((2, 3)))
    mass = mass / (len(rows) * (call.Hq // heads))
    return mass, mass.new_zeros(mass.shape[:2]) if call.sinks is None else (1 - mass.sum(-1)).clamp_min(0)
