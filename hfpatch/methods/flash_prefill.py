"""FlashPrefill: key blocks whose tile energy comes close to the best block's."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.common import dense_layers, floor, most_keys, sink_blocks, window_blocks
from ..config.method_config import option
from ..config.registry import register_method
from ..core.block_selector import BlockConfig, BlockSelector
from ..core.blocks import Grid, block_means, choosers, pad_to, within_budget
from ..core.call import AttentionCall
from ..core.logits import log_sum, logits
from ..core.selection import BlockMap, Rows
from ..ops import merge

CHUNK_ELEMENTS = 1 << 20


@dataclass(kw_only=True)
class FlashPrefillConfig(BlockConfig):
    """Settings of `flash_prefill`."""

    method: ClassVar[str] = "flash_prefill"
    alpha: float = option(0.12, "keep blocks with at least this share of the best block's energy", ge=0, le=1)
    budget: int | float | None = most_keys()
    floor: int = floor()
    sink_blocks: int = sink_blocks(2)
    window_blocks: int = window_blocks(4)
    last_blocks: int | None = option(
        None, "query tiles at the end of a prefill call that attend densely; 2, and with a budget 0", ge=0
    )
    dense_layers: int = dense_layers()
    mean_correction: bool = option(False, "dropped blocks count with their mean key and mean value")


@register_method
class FlashPrefill(BlockSelector[FlashPrefillConfig]):
    """Every query meets every mean key; a block stays when its summed exponentials reach alpha times the best.

    FlashPrefill, arXiv 2603.06199 (head_sharing="head") and its second version 2608.19758 ("group": the rows of a tile
    are the queries of all heads of a KV group). The paper's values of alpha: Llama-3.1-8B 0.18, Qwen3-30B-A3B 0.12,
    Qwen2.5-7B 0.08. The second version packs 128 rows of a group to a tile (block_q = 128 / heads per group).
    Its mean correction (`mean_correction`): every dropped block adds its length times exp(logit of its mean key) to
    the softmax, with its mean value; exact where the keys and values of a block are alike. It is left out of calls
    that another method narrows or biases. In chunked prefill the last tiles of each chunk are dense.
    """

    summary = "key blocks by tile energy and max threshold"
    paper = "https://arxiv.org/abs/2603.06199"

    def grid(self, call: AttentionCall) -> Grid | None:
        c = self.config
        last = (2 if c.budget is None else 0) if c.last_blocks is None else c.last_blocks
        stop = min((-(-call.Lq // c.block_q) - last) * c.block_q, call.Lq)
        return Grid.of(call.layout.rows(0, stop), c.block_q, c.block_k) if stop > 0 else None

    def scores(self, call: AttentionCall, grid: Grid) -> Tensor:
        means = block_means(call.k[:, :, : grid.at.Lk], grid.block_k)
        heads = choosers(grid.at, self.config.head_sharing)
        return tile_energy(call.q[:, :, : grid.at.Lq], means * call.scale, grid, heads)

    def choose(self, grid: Grid, scores: Tensor) -> BlockMap:
        c = self.config
        near = (scores > 0) & (scores >= c.alpha * scores.amax(-1, keepdim=True))
        keep = near if c.alpha > 0 else torch.ones_like(near)
        budget = None if c.budget is None else grid.budget(c.budget, c.floor)
        return within_budget(grid, scores, keep, grid.forced(c.sink_blocks, c.window_blocks, budget), budget)

    def output(self, call: AttentionCall, out: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        sel, stop = call.selection, call.Lq
        if isinstance(sel, Rows):
            stop, sel = sel.parts[0]
        if not self.config.mean_correction or call.lse is None or call.bias is not None:
            return out
        if not isinstance(sel, BlockMap):
            return out
        grid = Grid(call.layout.rows(0, stop), sel.block_q, sel.block_k)
        dropped = grid.past & ~sel.block_mask(grid.at)
        return with_means(call, grid, dropped, out, call.lse)


def with_means(call: AttentionCall, grid: Grid, dropped: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` with the mean keys and values of `dropped [B|1, H, nQ, nK]` blocks."""
    dropped = dropped.repeat_interleave(call.Hq // dropped.shape[1], 1)
    outs, lses, done = [], [], 0
    keys, values = (block_means(x[:, :, : grid.at.Lk], grid.block_k) for x in (call.k, call.v))
    values = values.repeat_interleave(call.groups, 1)  # [B, Hq, nK, Dv]
    step = max(1, CHUNK_ELEMENTS // (call.B * call.Hq * grid.block_q * grid.nk))
    for n in range(0, grid.nq, step):
        rows = slice(n * grid.block_q, min((n + step) * grid.block_q, grid.at.Lq))
        seen = (grid.at.off + rows.stop - 1) // grid.block_k
        if not seen:
            continue
        means = logits(call.q[:, :, rows].float(), keys[:, :, :seen], scale=call.scale, softcap=call.softcap)
        gone = dropped[:, :, n : n + step, :seen].repeat_interleave(grid.block_q, 2)[:, :, : means.shape[2]]
        means = (means + math.log(grid.block_k)).masked_fill(~gone, -torch.inf)  # [B, Hq, rows, seen]
        mass = log_sum(means)
        weights = torch.exp(means - mass.masked_fill(mass.isneginf(), 0.0)[..., None])
        parts = [(out[:, rows].transpose(1, 2).float(), lse[:, :, rows]), (weights @ values[:, :, :seen], mass)]
        o, merged = merge(parts)
        outs += [out[:, done : rows.start], o.transpose(1, 2).to(out.dtype)]
        lses += [lse[:, :, done : rows.start], merged]
        done = rows.stop
    return torch.cat([*outs, out[:, done:]], 1), torch.cat([*lses, lse[:, :, done:]], 2)


def tile_energy(q: Tensor, means: Tensor, grid: Grid, heads: int) -> Tensor:
    """Sums over a tile's rows of exp(logit - tile maximum), `[B, heads, nQ, nK]`, 0 for blocks no row sees whole.

    `q [B, Hq, Lq, D]`, `means [B, Hkv, nK, D]` scaled mean keys in float32.
    """
    b, hq, lq, _ = q.shape
    out = means.new_zeros(b, heads, grid.nq, grid.nk)
    step = max(1, CHUNK_ELEMENTS // (b * hq * grid.block_q * grid.nk))
    for n in range(0, grid.nq, step):
        start, stop = n * grid.block_q, min((n + step) * grid.block_q, lq)
        seen = (grid.at.off + stop) // grid.block_k
        if not seen:
            continue
        rows = logits(q[:, :, start:stop].float(), means[:, :, :seen], scale=1.0)  # [B, Hq, rows, seen]
        sure = (grid.at.off + start + 1) // grid.block_k
        position = torch.arange(grid.at.off + start, grid.at.off + stop, device=q.device)[:, None]
        rows[..., sure:].masked_fill_((grid.blocks[sure:seen] + 1) * grid.block_k > position + 1, -torch.inf)
        tiles = pad_to(rows, grid.block_q, -2, -torch.inf).unflatten(2, (-1, grid.block_q))
        tiles = tiles.unflatten(1, (heads, -1))  # [B, heads, Hq / heads, tiles, block_q, seen]
        top = tiles.amax((2, 4, 5), keepdim=True)
        energy = tiles.sub_(top.masked_fill(top.isneginf(), 0.0)).exp_().sum((2, 4))
        out[:, :, n : n + energy.shape[2], :seen] = energy
    return out
