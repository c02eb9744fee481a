"""Query tiles and key blocks of one call: geometry, pooling, budgets, and block maps made from scores.

Letters: nQ query tiles of `block_q` queries counted from the call's first one, nK key blocks of `block_k`
keys counted from the row's first real token, H heads that choose (Hq, Hkv or 1).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .selection import BlockMap, Layout, no_longer


@dataclass(frozen=True)
class Grid:
    """The tiles and blocks of a call."""

    at: Layout
    block_q: int
    block_k: int

    @classmethod
    def of(cls, at: Layout, block_q: int, block_k: int) -> "Grid":
        """Tiles and blocks of these sizes; what is far longer than the call is cut to it and means the same."""
        return cls(at, no_longer(block_q, at.Lq), no_longer(block_k, at.Lk))

    @property
    def nq(self) -> int:
        """Query tiles."""
        return -(-self.at.Lq // self.block_q)

    @property
    def nk(self) -> int:
        """Key blocks."""
        return -(-self.at.Lk // self.block_k)

    @cached_property
    def first(self) -> Tensor:
        """Position of each tile's first query, `[nQ]`."""
        return self.at.off + torch.arange(self.nq, device=self.at.device) * self.block_q

    @cached_property
    def last(self) -> Tensor:
        """Position of each tile's last query, `[nQ]`."""
        return (self.first + self.block_q).clamp(max=self.at.Lk) - 1

    @cached_property
    def blocks(self) -> Tensor:
        """Block numbers `[nK]`."""
        return torch.arange(self.nk, device=self.at.device)

    @cached_property
    def visible(self) -> Tensor:
        """Bool `[nQ, nK]`: some query of the tile sees some key of the block."""
        return self.blocks * self.block_k <= self.last[:, None]

    @cached_property
    def past(self) -> Tensor:
        """Bool `[nQ, nK]`: every query of the tile sees every key of the block."""
        return (self.blocks + 1) * self.block_k <= self.first[:, None] + 1

    def forced(self, sink: int, window: int) -> Tensor:
        """Bool `[nQ, nK]`: the first `sink` blocks, the last `window` blocks and all partly visible ones."""
        recent = self.blocks > (self.last // self.block_k - window)[:, None]
        return self.visible & ((self.blocks < sink) | recent | ~self.past)

    def budget(self, budget: int | float) -> Tensor:
        """Blocks `[nQ]` that hold `budget` tokens, or this share of the keys visible to the tile's last query."""
        if isinstance(budget, int):
            return torch.full_like(self.last, -(-budget // self.block_k))
        return ((self.last + 1) * budget / self.block_k).ceil().long()


def top_blocks(grid: Grid, score: Tensor, forced: Tensor, budget: Tensor) -> BlockMap:
    """The `budget [nQ]` best visible blocks by `score [B, H, nQ, nK]`; the forced ones come first and count."""
    counts = torch.minimum(torch.maximum(budget, forced.sum(-1)), grid.visible.sum(-1))
    score = score.masked_fill(forced, torch.inf).masked_fill(~grid.visible, -torch.inf)
    indices = score.topk(int(counts.max()), dim=-1).indices  # [B, H, nQ, K]
    return BlockMap(indices, counts.expand(*score.shape[:3]), grid.block_q, grid.block_k)


def kept_blocks(grid: Grid, keep: Tensor) -> BlockMap:
    """The visible blocks of `keep [B|1, H, nQ, nK]`, in order of position."""
    keep = keep & grid.visible
    counts = keep.sum(-1)
    order = keep.int() * grid.nk - grid.blocks.int()  # kept blocks first, from the left
    return BlockMap(order.topk(int(counts.max()), dim=-1).indices, counts, grid.block_q, grid.block_k)


def within_budget(grid: Grid, score: Tensor, keep: Tensor, forced: Tensor, budget: int | float | None) -> BlockMap:
    """Blocks `forced [nQ, nK]` or `keep [B|1, H, nQ, nK]`; past the budget, kept ones with the lowest scores go."""
    keep = (keep | forced) & grid.visible
    if budget is None:
        return kept_blocks(grid, keep)
    best = top_blocks(grid, score.masked_fill(~keep, -torch.inf), forced, grid.budget(budget))
    return BlockMap(best.indices, torch.minimum(best.counts, keep.sum(-1)), grid.block_q, grid.block_k)


def top_p_blocks(
    grid: Grid, mass: Tensor, forced: Tensor, p: float, floor: int = 0, budget: int | float | None = None
) -> BlockMap:
    """The forced blocks, then the best by `mass [B, H, nQ, nK]` until all kept hold `p` of it.

    At least `floor` tokens are kept, and at most `budget` (tokens or a share of the visible keys), which gives way to
    the floor and to `forced [nQ, nK]`.
    """
    ranked = mass.masked_fill(forced, torch.inf).masked_fill(~grid.visible, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True)  # [B, H, nQ, nK]
    mass = mass.masked_fill(~grid.visible, 0.0).gather(-1, order)
    counts = (mass.cumsum(-1) - mass < p * mass.sum(-1, keepdim=True)).sum(-1) if p < 1 else grid.visible.sum(-1)
    least = torch.maximum(forced.sum(-1), grid.budget(floor))
    if budget is not None:
        counts = torch.minimum(counts, grid.budget(budget))
    counts = torch.minimum(torch.maximum(counts, least), grid.visible.sum(-1)).expand(*order.shape[:3])
    return BlockMap(order[..., : int(counts.max())], counts, grid.block_q, grid.block_k)


def top_p(weights: Tensor, p: float) -> Tensor:
    """Bool like `weights [..., n]`: the smallest set of largest weights that reaches `p` times their sum."""
    if p >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    ranked, order = weights.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    keep = before < p * ranked.sum(-1, keepdim=True)
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def block_means(x: Tensor, size: int) -> Tensor:
    """Means `[B, H, n, D]` in float32 over blocks of `size` tokens of `x [B, H, L, D]`; the last may be short."""
    whole = x.shape[2] // size
    means = x[:, :, : whole * size].unflatten(2, (whole, size)).mean(3, dtype=torch.float32)  # [B, H, whole, D]
    if whole * size == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole * size :].mean(2, keepdim=True, dtype=torch.float32)], dim=2)


def choosers(at: Layout, share: str) -> int:
    """Number H of heads with a selection of their own."""
    return {"group": at.Hkv, "head": at.Hq, "all": 1}[share]


def pad_to(x: Tensor, size: int, dim: int, value: float = 0.0) -> Tensor:
    """`x` filled up with `value` to a multiple of `size` along `dim` (negative)."""
    short = -x.shape[dim] % size
    return pad(x, [0] * (-2 * dim - 1) + [short], value=value) if short else x


def tokens_of(budget: int | float, length: int) -> int:
    """A budget in tokens, given the number of visible keys."""
    return budget if isinstance(budget, int) else math.ceil(budget * length)
