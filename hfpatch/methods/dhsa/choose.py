"""From chunk scores to token lists: exactly N_b tokens per query block, no token twice.

Everything is counted in units of `align` tokens; with align 1 a unit is a token. The list of query block n is

    sink  | chosen chunks, in order of position | recent: `local` tokens before the block, and the block itself
    [0,s) | within [s, low_n)                   | [low_n, high_n)

so it is sorted, its runs do not meet, and the sink and the recent tokens are inside the budget. Chunks are taken
best first; the one that no longer fits is cut to its first tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.selection import BlockMap, Layout


@dataclass(eq=False)
class Room:
    """The budget of query blocks `[nQ]`, in units: sink `[0, sink)`, recent `[low, high)`, `budget` of `total`.

    `recent [nQ]` is where in the list the recent units begin, `shift [nQ]` what turns a slot there into a unit;
    `slots [budget]` are the slots of a list, `full` (no dimensions) is its length. Where `own [nQ]` is given it is the
    budget of each, and the rest of a list means nothing. With a `total` of 0 nothing is read on the host.
    """

    sink: int
    low: Tensor
    high: Tensor
    budget: int
    total: int
    own: Tensor | None = None

    def __post_init__(self) -> None:
        self.recent = (self.budget if self.own is None else self.own) - self.high + self.low
        self.shift = self.low - self.recent
        self.slots = torch.arange(self.budget, device=self.low.device)
        self.full = torch.full((), self.budget, dtype=torch.int32, device=self.low.device)


@dataclass(frozen=True, eq=False)
class TokenLists(BlockMap):
    """A BlockMap whose lists are all full, sorted, and end with the query block's own tokens: counted in no time."""

    def attended(self, at: Layout) -> int:  # type: ignore[override]
        a, total = self.block_k, 0
        width = self.indices.shape[-1] * a
        for start in range(0, at.Lq, self.block_q):
            rows = min(self.block_q, at.Lq - start)
            own = -(-(at.off + start + rows) // a) * a - (at.off + start)
            total += rows * (width - own) + rows * (rows + 1) // 2
        return total * at.B * at.Hq


def whole(tokens: Tensor, align: int) -> Tensor:
    """Positions in tokens as positions in units, rounded down."""
    return tokens if align == 1 else tokens // align


def kept_units(score: Tensor, starts: Tensor, ends: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """How many units of every chunk are kept, and where its candidates begin: `[B, H, nQ, C]`, `[B, 1, nQ, C]`.

    `score [B, H, nQ, C]`, `starts`, `ends [B, C]` in units.
    """
    first = starts[:, None, None].clamp(min=room.sink)
    length = (ends[:, None, None].minimum(room.low[:, None]) - first).clamp_min(0)
    score = score.masked_fill(length == 0, -torch.inf)
    order, sizes = _best(score, length.expand_as(score), room)
    left = (room.recent - room.sink)[:, None] - sizes.cumsum(-1) + sizes
    fits = left.clamp_min(0).minimum(sizes)
    return torch.zeros_like(score, dtype=fits.dtype).scatter_(-1, order, fits), first


def _best(score: Tensor, length: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """Chunks in order of `score [B, H, nQ, C]`, as many as fill the budget, with their lengths.

    Twice as many as chunks of average length would take; only where that falls short all are sorted. On a GPU, which
    would be waited for to see that, all are.
    """
    count = score.shape[-1]
    some = 2 * count * room.budget // max(1, room.total) + 16
    if some < count and score.device.type == "cpu":
        order = score.topk(some, dim=-1).indices
        sizes = length.gather(-1, order)
        if bool((sizes.sum(-1) >= room.recent - room.sink).all()):
            return order, sizes
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order, length.gather(-1, order)


def list_units(kept: Tensor, first: Tensor, room: Room) -> Tensor:
    """Unit lists `[B, H, nQ, budget]`, sorted, from the units kept of every chunk.

    A run that begins at unit u and at slot t of the list adds u - t to the slot number; that shift never falls
    along the list, so one running maximum fills it in. Chunks of which nothing is kept write to a slot of no list.
    """
    b, h, n, _ = kept.shape
    slot = kept.cumsum(-1) - kept + room.sink
    shift = first - slot
    slot = slot.masked_fill_(kept == 0, room.budget)
    lists = kept.new_zeros(b, h, n, room.budget + 1)
    lists.scatter_(-1, slot, shift)
    recent = room.recent
    lists.scatter_(-1, recent[:, None].expand(b, h, n, 1), room.shift[:, None].expand(b, h, n, 1))
    lists = lists[..., :-1].cummax(-1).values
    return lists + room.slots


def choose(score: Tensor, starts: Tensor, ends: Tensor, room: Room, block_q: int, align: int) -> TokenLists:
    """Token lists of all query blocks; every block must have at least `budget` units up to its end."""
    kept, first = kept_units(score, starts, ends, room)
    lists = list_units(kept, first, room).int()
    return TokenLists(lists, room.full.expand(lists.shape[:3]), block_q, align)
