"""What a method may answer when asked which keys each query attends to.

Letters: B rows, Hq / Hkv query / key-value heads, Lq / Lk query / key length, `off = Lk - Lq`.
A selection speaks of *real* tokens only: key `j` is the j-th real token of its row, query `i` of a call
sits at position `off + i`. Causality is implied: no selection can show a query a later key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def pairs(b: int, hq: int, lq: int, lk: int) -> int:
    """(row, head, query, key) pairs of causal attention of the last `lq` of `lk` positions."""
    return b * hq * (lq * (lk - lq) + lq * (lq + 1) // 2)


@dataclass(frozen=True)
class Layout:
    """Sizes of one call: what a selection needs to know to be written out."""

    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    device: torch.device

    @property
    def off(self) -> int:
        """Position of the first query."""
        return self.Lk - self.Lq

    @property
    def visible(self) -> int:
        """(row, head, query, key) pairs dense causal attention looks at."""
        return pairs(self.B, self.Hq, self.Lq, self.Lk)

    def positions(self, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Query positions `[Lq, 1]` and key positions `[1, n]`, all keys unless `keys [n]` are named."""
        i = torch.arange(self.off, self.Lk, device=self.device)[:, None]
        j = torch.arange(self.Lk, device=self.device) if keys is None else keys.to(self.device)
        return i, j[None, :]

    def rows(self, start: int, stop: int) -> "Layout":
        """The layout of queries `start..stop`, with the keys up to the last of them."""
        return Layout(self.B, self.Hq, self.Hkv, stop - start, self.off + stop, self.device)


class Selection:
    """Base class: `mask` is the definition, `attended` its size."""

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        """Bool `[B|1, Hq|1, Lq, n]`, True where query i may attend to key j; `keys [n]` restricts the columns."""
        raise TypeError(f"{type(self).__name__} does not define mask()")

    def attended(self, at: Layout) -> int | Tensor:
        """Number of (row, head, query, key) pairs kept; a 0-d tensor where counting eagerly would synchronise."""
        m = self.mask(at)
        return m.sum() * (at.B // m.shape[0]) * (at.Hq // m.shape[1])


@dataclass(frozen=True)
class Causal(Selection):
    """Every earlier key: dense attention."""

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        i, j = at.positions(keys)
        return (j <= i)[None, None]

    def attended(self, at: Layout) -> int:
        return at.visible


@dataclass(frozen=True)
class SinkWindow(Selection):
    """The first `sink` tokens and the last `window` tokens up to and including the query itself."""

    sink: int
    window: int

    def keep(self, i: Any, j: Tensor) -> Tensor:
        """Whether queries at positions `i` see keys at positions `j`."""
        return (j <= i) & ((j < self.sink) | (i - j < self.window))

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        return self.keep(*at.positions(keys))[None, None]

    def attended(self, at: Layout) -> int:
        full = self.sink + self.window
        short = max(0, min(at.Lk, full) - at.off)
        first = at.off + 1
        pairs = short * first + short * (short - 1) // 2 + (at.Lq - short) * full
        return at.B * at.Hq * pairs


@dataclass(frozen=True)
class Predicate(Selection):
    """A static rule `rule(h, i, j) -> bool` over head `[Hq, 1, 1]`, query and key position tensors."""

    rule: Callable[[Tensor, Tensor, Tensor], Tensor]

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        i, j = at.positions(keys)
        h = torch.arange(at.Hq, device=at.device)[:, None, None]
        keep = self.rule(h, i, j) & (j <= i)
        return keep.expand(1, *torch.broadcast_shapes(keep.shape, (1, at.Lq, j.shape[1])))


def no_longer(block: int, length: int) -> int:
    """A block size, cut to the next power of two from `length` on, 16 at least: one block holds all either way."""
    return min(block, max(16, 1 << max(0, length - 1).bit_length()))


@dataclass(frozen=True, eq=False)
class BlockMap(Selection):
    """Per query block a list of key blocks; `block_k = 1` makes it a list of tokens.

    `indices [B|1, H, nQ, K]` (integer) with H = 1, Hkv or Hq; entries past `counts [B|1, H, nQ]` are ignored.
    Query block n covers queries `n*block_q ..` of this call, key block m covers keys `m*block_k ..`.
    No block may be listed twice in one row of `indices`.
    """

    indices: Tensor
    counts: Tensor
    block_q: int
    block_k: int

    def fitted(self, at: Layout) -> "BlockMap":
        """The same choice with blocks that are not far longer than the call: work then follows the call."""
        block_q, block_k = no_longer(self.block_q, at.Lq), no_longer(self.block_k, at.Lk)
        same = (block_q, block_k) == (self.block_q, self.block_k)
        return self if same else BlockMap(self.indices, self.counts, block_q, block_k)

    def listed(self) -> Tensor:
        """Bool like `indices`: which entries count."""
        return torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]

    def block_mask(self, at: Layout) -> Tensor:
        """Bool `[B|1, H, nQ, nK]`."""
        nk = -(-at.Lk // self.block_k)
        slots = torch.where(self.listed(), self.indices.long(), nk)
        out = slots.new_zeros((*self.indices.shape[:-1], nk + 1), dtype=torch.bool)
        return out.scatter_(-1, slots, True)[..., :nk]

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        i, j = at.positions(keys)
        blocks = self.block_mask(at)
        keep = blocks.index_select(-1, j[0] // self.block_k)
        keep = keep.index_select(2, torch.arange(at.Lq, device=j.device) // self.block_q) & (j <= i)
        return keep.repeat_interleave(at.Hq // keep.shape[1], dim=1) if keep.shape[1] > 1 else keep

    def attended(self, at: Layout) -> Tensor:
        width = self.block_k
        small = width * (at.Lk + self.block_q) < 2**31
        first = self.indices.to(torch.int32 if small else torch.int64) * width
        begin = torch.arange(at.off, at.Lk, self.block_q, dtype=first.dtype, device=first.device)
        after = (begin + self.block_q).clamp_max(at.Lk)
        kept = (_seen(after[:, None] - first, width) - _seen(begin[:, None] - first, width)) * self.listed()
        return kept.sum() * (at.B // self.indices.shape[0]) * (at.Hq // self.indices.shape[1])


def _seen(count: Tensor, width: int) -> Tensor:
    """Keys of a block that the `count` queries from its first key on see: 1 + 2 + ..., at most `width` for each."""
    rising = count.clamp(0, width)
    return rising * (rising + 1) // 2 + (count - width).clamp_min(0) * width


@dataclass(frozen=True, eq=False)
class Rows(Selection):
    """Different selections for consecutive ranges of queries: `parts` are `(stop, selection)` in order."""

    parts: Sequence[tuple[int, Selection]]

    def ranges(self, at: Layout) -> list[tuple[int, int, Selection]]:
        """`(start, stop, selection)` of the non-empty ranges; the last one reaches to Lq."""
        out, start = [], 0
        for n, (stop, sel) in enumerate(self.parts):
            stop = at.Lq if n == len(self.parts) - 1 else min(stop, at.Lq)
            if stop > start:
                out.append((start, stop, sel))
                start = stop
        return out

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        cols = torch.arange(at.Lk, device=at.device) if keys is None else keys
        masks = []
        for start, stop, sel in self.ranges(at):
            part = at.rows(start, stop)
            m = sel.mask(part, cols.clamp(max=part.Lk - 1)) & (cols < part.Lk)
            masks.append(m)
        b, h = max(m.shape[0] for m in masks), max(m.shape[1] for m in masks)
        return torch.cat([m.expand(b, h, *m.shape[2:]) for m in masks], dim=2)

    def attended(self, at: Layout) -> int | Tensor:
        return sum(sel.attended(at.rows(a, b)) for a, b, sel in self.ranges(at))


@dataclass(frozen=True, eq=False)
class Both(Selection):
    """The keys two selections agree on."""

    first: Selection
    second: Selection

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        return self.first.mask(at, keys) & self.second.mask(at, keys)


def intersect(a: Selection | None, b: Selection | None) -> Selection | None:
    """AND of two selections; None selects everything."""
    if a is None or isinstance(a, Causal):
        return b if b is not None else a
    if b is None or isinstance(b, Causal):
        return a
    if isinstance(a, SinkWindow) and isinstance(b, SinkWindow) and a.sink == b.sink:
        return SinkWindow(a.sink, min(a.window, b.window))
    return Both(a, b)
