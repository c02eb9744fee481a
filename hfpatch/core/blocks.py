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

    @cached_property
    def before(self) -> Tensor:
        """Blocks `[nQ]` before those that hold keys of the tile's own tokens."""
        return self.first // self.block_k

    @cached_property
    def own(self) -> Tensor:
        """Blocks `[nQ]` that hold keys of the tile's own tokens; no budget takes them away."""
        return self.last // self.block_k + 1 - self.before

    def forced(self, sink: int, window: int, budget: Tensor | None = None) -> Tensor:
        """Bool `[nQ, nK]`: the first `sink` blocks, the last `window` blocks and the tile's own.

        Of a `budget [nQ]`, sink and window take at most half of what its own blocks leave, so that there is something
        to choose: the sink comes first, then the latest of the window.
        """
        first, recent = self.blocks < sink, self.blocks > (self.last // self.block_k - window)[:, None]
        if budget is not None:
            room = ((budget - self.own).clamp(min=0) + 1) // 2
            first = first & (self.blocks < room[:, None])
            recent = recent & (self.blocks >= (self.before - room + room.clamp(max=sink))[:, None])
        return self.visible & (first | recent | (self.blocks >= self.before[:, None]))

    def budget(self, budget: int | float, floor: int = 0) -> Tensor:
        """Blocks `[nQ]` of a budget as `config/common.py` defines it, the tile's own among them.

        Tokens: no query of the tile gets more. A share: of all (query, key) pairs that the tile can see, to the
        nearest block, and every query gets `floor` keys at least.
        """
        before = self.before * self.block_k
        if isinstance(budget, int):
            spare = (budget - (self.last + 1 - before)) // self.block_k
        else:
            mean = (self.first + self.last) / 2 + 1  # keys that the tile's queries see
            spare = ((budget * mean - (mean - before)) / self.block_k).round().long()
        least = self.least(floor) if floor and not isinstance(budget, int) else self.own
        return torch.maximum(self.own + spare.clamp(min=0), least)

    def most(self, budget: int | float, floor: int, always: int) -> int:
        """What no tile's number of blocks exceeds under a `budget`, where `always` ones are of sink and window."""
        own = (self.block_q - 2) // self.block_k + 2
        tokens = budget if isinstance(budget, int) else max(math.ceil(budget * self.at.Lk), floor)
        return min(self.nk, own + max(tokens // self.block_k + 1, always))

    def least(self, floor: int) -> Tensor:
        """Blocks `[nQ]` with which every query of a tile sees `floor` keys, or all that there are."""
        short = floor - (self.first + 1 - self.before * self.block_k)
        spare = -(-short // self.block_k)
        return torch.minimum(self.own + spare.clamp(min=0), self.visible.sum(-1))


def longest(counts: Tensor, most: int) -> int:
    """The largest of `counts`; on a GPU, which reading it would wait for, what none of them exceeds."""
    return int(counts.max()) if counts.device.type == "cpu" else most


def top_blocks(grid: Grid, score: Tensor, forced: Tensor, budget: Tensor, most: int | None = None) -> BlockMap:
    """The `budget [nQ]` best visible blocks by `score [B, H, nQ, nK]`; the forced ones come first and count.

    No tile has more than `most`.
    """
    counts = torch.minimum(torch.maximum(budget, forced.sum(-1)), grid.visible.sum(-1))
    score = score.masked_fill(forced, torch.inf).masked_fill(~grid.visible, -torch.inf)
    indices = score.topk(longest(counts, most or grid.nk), dim=-1).indices  # [B, H, nQ, K]
    return BlockMap(indices, counts.expand(*score.shape[:3]), grid.block_q, grid.block_k)


def kept_blocks(grid: Grid, keep: Tensor) -> BlockMap:
    """The visible blocks of `keep [B|1, H, nQ, nK]`, in order of position."""
    keep = keep & grid.visible
    counts = keep.sum(-1)
    order = keep.int() * grid.nk - grid.blocks.int()  # kept blocks first, from the left
    indices = order.topk(longest(counts, grid.nk), dim=-1).indices
    return BlockMap(indices, counts, grid.block_q, grid.block_k)


def within_budget(grid: Grid, score: Tensor, keep: Tensor, forced: Tensor, budget: Tensor | None) -> BlockMap:
    """Blocks `forced [nQ, nK]` or `keep [B|1, H, nQ, nK]`; past `budget [nQ]`, kept ones with the lowest scores go."""
    keep = (keep | forced) & grid.visible
    if budget is None:
        return kept_blocks(grid, keep)
    best = top_blocks(grid, score.masked_fill(~keep, -torch.inf), forced, budget)
    return BlockMap(best.indices, torch.minimum(best.counts, keep.sum(-1)), grid.block_q, grid.block_k)


def top_p_blocks(
    grid: Grid, mass: Tensor, forced: Tensor, p: float, floor: int = 0, budget: Tensor | None = None
) -> BlockMap:
    """Blocks `forced [nQ, nK]`, then the best by `mass [B, H, nQ, nK]` until all kept hold `p` of it.

    Every query keeps `floor` keys at least; at most `budget [nQ]` blocks, floor included.
    """
    ranked = mass.masked_fill(forced, torch.inf).masked_fill(~grid.visible, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True)  # [B, H, nQ, nK]
    mass = mass.masked_fill(~grid.visible, 0.0).gather(-1, order)
    counts = (mass.cumsum(-1) - mass < p * mass.sum(-1, keepdim=True)).sum(-1) if p < 1 else grid.visible.sum(-1)
    counts = torch.maximum(counts, torch.maximum(forced.sum(-1), grid.least(floor)))
    if budget is not None:
        counts = torch.minimum(counts, budget)
    counts = torch.minimum(counts, grid.visible.sum(-1)).expand(*order.shape[:3])
    return BlockMap(order[..., : longest(counts, grid.nk)], counts, grid.block_q, grid.block_k)


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


def tokens_within(share: float, length: Tensor) -> Tensor:
    """`tokens_of` a share for lengths on the device, whole numbers of any shape."""
    exact = torch.float32 if length.device.type == "mps" else torch.float64
    return (length.to(exact) * share).ceil().long()
