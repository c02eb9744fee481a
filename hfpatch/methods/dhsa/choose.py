"""From chunk scores to token lists: exactly N_b tokens per query block, no token twice.

Everything is counted in units of `align` tokens; with align 1 a unit is a token. The list of query block n is

    sink  | chosen chunks, in order of position | recent: `local` tokens before the block, and the block itself
    [0,s) | within [s, low_n)                   | [low_n, high_n)

so it is sorted, its runs do not meet, and the sink and the recent tokens are inside the budget. Chunks are taken
best first; the one that no longer fits is cut to its first tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.selection import BlockMap, Layout


class Units(NamedTuple):
    """A `Room` on its device: per query block `[nQ]` where it begins and its recent units, `slots [budget]` of a list.

    `recent` is where in the list the recent units begin, `shift` what turns a slot there into a unit. Lists have
    `budget` of `total` units, the first `sink` of them always; with a `total` of 0 nothing is read on the host.
    """

    sink: int
    budget: int
    total: int
    begin: Tensor
    low: Tensor
    recent: Tensor
    shift: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class Room:
    """The budget of the query blocks of `block` queries from position `first` to `stop`, of `keys` known.

    In units: the first `sink`, a block's recent `[low, high)` from `local` tokens before it on, `budget` in all.
    `full` (no dimensions) is the length of a list.
    """

    first: int
    stop: int
    block: int
    budget: int
    keys: int
    sink: int
    local: int
    align: int
    full: Tensor

    @cached_property
    def units(self) -> Units:
        """The units of every query block, worked out where somebody asks for them."""
        align = self.align
        with torch.inference_mode(False):  # a later call may be one of training
            begin = torch.arange(self.first, self.stop, self.block, device=self.full.device)
            low = whole(begin - self.local, align).clamp(min=self.sink)
            high = whole((begin + self.block).clamp(max=self.stop) + (align - 1), align)
            recent = self.budget - high + low
            slots = torch.arange(self.budget, device=self.full.device)
            return Units(self.sink, self.budget, self.keys // align, begin, low, recent, low - recent, slots)


class Rooms:
    """The last `Room` asked for: all layers of a pass have the same; the length of a list stays for many passes."""

    def __init__(self, sink: int, local: int, align: int) -> None:
        self.around = -(-sink // align), local, align
        self._last: Room | None = None

    def of(self, queries: tuple[int, int], block: int, budget: int, keys: int, device: torch.device) -> Room:
        """The room of the query blocks at positions `queries`."""
        last, of = self._last, (*queries, block, budget, keys)
        same = last is not None and last.full.device == device
        if last is None or not same or (last.first, last.stop, last.block, last.budget, last.keys) != of:
            if last is None or not same or last.budget != budget:
                with torch.inference_mode(False):
                    full = torch.full((), budget, dtype=torch.int32, device=device)
            else:
                full = last.full
            last = self._last = Room(*of, *self.around, full)
        return last


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


def kept_units(score: Tensor, starts: Tensor, ends: Tensor, at: Units) -> tuple[Tensor, Tensor]:
    """How many units of every chunk are kept, and where its candidates begin: `[B, H, nQ, C]`, `[B, 1, nQ, C]`.

    `score [B, H, nQ, C]`, `starts`, `ends [B, C]` in units.
    """
    first = starts[:, None, None].clamp(min=at.sink)
    length = (ends[:, None, None].minimum(at.low[:, None]) - first).clamp_min(0)
    score = score.masked_fill(length == 0, -torch.inf)
    order, sizes = _best(score, length.expand_as(score), at)
    left = (at.recent - at.sink)[:, None] - sizes.cumsum(-1) + sizes
    fits = left.clamp_min(0).minimum(sizes)
    return torch.zeros_like(score, dtype=fits.dtype).scatter_(-1, order, fits), first


def _best(score: Tensor, length: Tensor, at: Units) -> tuple[Tensor, Tensor]:
    """Chunks in order of `score [B, H, nQ, C]`, as many as fill the budget, with their lengths.

    Twice as many as chunks of average length would take; only where that falls short all are sorted. On a GPU, which
    would be waited for to see that, all are.
    """
    count = score.shape[-1]
    some = 2 * count * at.budget // max(1, at.total) + 16
    if some < count and score.device.type == "cpu":
        order = score.topk(some, dim=-1).indices
        sizes = length.gather(-1, order)
        if bool((sizes.sum(-1) >= at.recent - at.sink).all()):
            return order, sizes
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order, length.gather(-1, order)


def list_units(kept: Tensor, first: Tensor, at: Units) -> Tensor:
    """Unit lists `[B, H, nQ, budget]`, sorted, from the units kept of every chunk.

    A run that begins at unit u and at slot t of the list adds u - t to the slot number; that shift never falls
    along the list, so one running maximum fills it in. Chunks of which nothing is kept write to a slot of no list.
    """
    b, h, n, _ = kept.shape
    slot = kept.cumsum(-1) - kept + at.sink
    shift = first - slot
    slot = slot.masked_fill_(kept == 0, at.budget)
    lists = kept.new_zeros(b, h, n, at.budget + 1)
    lists.scatter_(-1, slot, shift)
    lists.scatter_(-1, at.recent[:, None].expand(b, h, n, 1), at.shift[:, None].expand(b, h, n, 1))
    lists = lists[..., :-1].cummax(-1).values
    return lists + at.slots


def choose(score: Tensor, starts: Tensor, ends: Tensor, room: Room) -> Tensor:
    """Unit lists `[B, H, nQ, budget]` of all query blocks; each must have at least `budget` units up to its end.

    `score [B, H, nQ, C]`, `starts`, `ends [B, C]` in tokens.
    """
    at = room.units
    kept, first = kept_units(score, whole(starts, room.align), whole(ends, room.align), at)
    return list_units(kept, first, at).int()


def token_lists(lists: Tensor, room: Room) -> TokenLists:
    """The selection made of unit lists `[B, H, nQ, budget]`."""
    return TokenLists(lists, room.full.expand(lists.shape[:3]), room.block, room.align)
