"""Block-sparse prefill: a few real queries of every tile look at real keys and choose the tile's key blocks."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.common import most_keys, sink_blocks, window_blocks
from ..config.method_config import option
from ..config.registry import register_method
from ..core.block_selector import BlockConfig, BlockSelector
from ..core.blocks import Grid, pad_to, top_p_blocks
from ..core.call import AttentionCall
from ..core.sampling import sampled_weights
from ..core.selection import BlockMap
from ..errors import ConfigError


@dataclass(kw_only=True)
class SampledConfig(BlockConfig):
    """Settings of `sampled`."""

    method: ClassVar[str] = "sampled"
    queries: int = option(8, "real queries per tile that choose for it, the last one among them", ge=1)
    pool: int = option(1, "keys per mean that they look at; 1 is the keys themselves", ge=1)
    top_p: float = option(0.9, "keep the fewest blocks with this share of the queries' attention", gt=0, le=1)
    budget: int | float | None = most_keys()
    floor: int = option(256, "keys that every query gets at least; a budget in tokens goes first", ge=0)
    block_q: int = option(64, "queries per tile", ge=1)
    block_k: int = option(64, "keys per block", ge=1)
    sink_blocks: int = sink_blocks(1, old=None)
    window_blocks: int = window_blocks(2, old=None)

    def validate(self) -> None:
        if self.block_k % self.pool:
            raise ConfigError(f"sampled: pool={self.pool} must divide block_k={self.block_k}.")


@register_method
class Sampled(BlockSelector[SampledConfig]):
    """Some queries of a tile attend densely; the blocks that get most of their attention are the tile's.

    No paper: averaging the queries of a tile, as pooled scorers do, loses what few of them look for. Evenly spaced
    queries against all keys cost `queries / block_q` of the products of dense attention; `pool` divides that. Heads
    that share a choice add their attention up. Forced blocks count towards `top_p`.
    """

    summary = "key blocks by the attention of a few real queries per tile"

    def scores(self, call: AttentionCall, grid: Grid) -> Tensor:
        c = self.config
        return self.sharing(sampled_mass(call, grid, c.queries, math.gcd(c.pool, grid.block_k)), grid).mean(2)

    def choose(self, grid: Grid, scores: Tensor) -> BlockMap:
        c = self.config
        budget = None if c.budget is None else grid.budget(c.budget, c.floor)
        forced = grid.forced(c.sink_blocks, c.window_blocks, budget)
        return top_p_blocks(grid, scores, forced, c.top_p, c.floor, budget)


def sampled_mass(call: AttentionCall, grid: Grid, queries: int, pool: int = 1) -> Tensor:
    """Mean attention of `queries` queries per tile to each key block, `[B, Hq, nQ, nK]` in float32."""
    out = torch.zeros(call.B, call.Hq, grid.nq, grid.nk, device=call.q.device)
    wide = grid.block_k // pool  # means of a block
    for first, weights in sampled_weights(call, 0, grid.at.Lq, grid.block_q, queries, pool):
        mass = pad_to(weights.mean(3), wide, -1).unflatten(-1, (-1, wide)).sum(-1)  # [B, Hq, tiles, blocks]
        out[:, :, first : first + mass.shape[2], : mass.shape[3]] = mass
    return out
