"""The chunk table of one layer and cache: boundaries, chunk representations, and the open chunk of new tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .boundaries import to_list
from .rotary import Rotary
from .score import Chunks

Finder = Callable[[int, int], Tensor]
ALL = Rotary()
SEGMENT = 2048
LARGEST_COPY = 1 << 26  # numbers


def chunk_sums(k: Tensor, starts: Tensor, first: int) -> Tensor:
    """Float32 sums `[B, Hkv, C, 2 D]` of k and of k squared over chunks that begin at `starts [B, C]`.

    Tokens `first ..` of `k [B, Hkv, Lk, D]`, row by row and about `SEGMENT` tokens at a time, which keeps the copy in
    float32 small. A GPU, which would be waited for to see where a segment ends, takes some heads at a time instead.
    """
    b, heads, stop, d = k.shape
    if k.device.type != "cpu":
        return _sums_by_heads(k, starts, first)
    out = k.new_zeros((b, heads, starts.shape[1], 2 * d), dtype=torch.float32)
    step = max(1, starts.shape[1] * SEGMENT // max(1, stop - first))
    edges = F.pad(starts[:, ::step], (0, 1), value=stop).tolist()
    for row in range(b):
        for n, (low, high) in enumerate(pairwise(edges[row])):
            if low == high:
                continue
            some = slice(n * step, (n + 1) * step)
            x = k[row, :, low:high].transpose(0, 1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            every, offsets = torch.arange(high - low, device=k.device), starts[row, some] - low
            for part in (slice(0, d), slice(d, 2 * d)):
                sums = F.embedding_bag(every, x.view(high - low, -1), offsets, mode="sum")
                out[row, :, some, part] = sums.view(-1, heads, d).transpose(0, 1)
                x.square_()
    return out


def _sums_by_heads(k: Tensor, starts: Tensor, first: int) -> Tensor:
    b, heads, stop, d = k.shape
    out = k.new_zeros((b, heads, starts.shape[1], 2 * d), dtype=torch.float32)
    every, some = torch.arange(stop - first, device=k.device), max(1, LARGEST_COPY // max(1, (stop - first) * d))
    for row, offsets in enumerate(starts - first):
        for h in range(0, heads, some):
            x = k[row, h : h + some, first:].transpose(0, 1)
            x = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format).flatten(1)
            for part in (slice(0, d), slice(d, 2 * d)):
                sums = F.embedding_bag(every, x, offsets, mode="sum").unflatten(1, (-1, d))
                out[row, h : h + some, :, part] = sums.transpose(0, 1)
                x.square_()
    return out


def spread(sums: Tensor, length: Tensor | int, rotary: Rotary) -> Tensor:
    """Means and variances per plane `[..., D + P]` from `sums [..., 2 D]` of k and of k squared over `length` keys."""
    mean, square = (sums / length).chunk(2, -1)
    channels = rotary.fold(mean.new_ones(mean.shape[-1]))
    return torch.cat([mean, rotary.fold((square - mean.square()).clamp_min(0)) / channels], -1)


@dataclass(eq=False)
class ChunkTable:
    """Chunks of the rows' first `closed` tokens; tokens `closed .. seen` form one open chunk.

    `starts [B, C]`; rows with fewer chunks are padded with empty ones. `moments [B, Hkv, M + 1, D + P]` are means of
    the keys and variances per rotary plane, in the keys' dtype, of the M chunks up to token `measured`, the open
    chunk's last. `open [B, Hkv, 2 D]` are float32 sums of the open chunk's keys and their squares up to token `added`.
    `closings` tell how chunks were closed: how many keys there were, up to which token, columns of `starts` before.
    `listed` is what `closed` was when the chunks were last written out for steps in a graph.
    """

    starts: Tensor
    moments: Tensor
    open: Tensor
    rotary: Rotary = ALL
    closed: int = 0
    seen: int = 0
    measured: int = 0
    added: int = 0
    closings: tuple[tuple[int, int, int], ...] = ()
    listed: int = -1

    @classmethod
    def empty(cls, k: Tensor, rotary: Rotary = ALL) -> ChunkTable:
        """A table without tokens for keys like `k [B, Hkv, L, D]`."""
        starts = torch.zeros(k.shape[0], 0, dtype=torch.long, device=k.device)
        open = torch.zeros(*k.shape[:2], 2 * k.shape[3], device=k.device)
        return cls(starts, spread(open, 1, rotary)[:, :, None].to(k.dtype), open, rotary)

    @property
    def spans(self) -> tuple[Tensor, Tensor]:
        """First token and one past the last of every chunk, `[B, C + 1]`, the open one last."""
        starts = F.pad(self.starts, (0, 1), value=self.closed)
        return starts, F.pad(starts[:, 1:], (0, 1), value=self.seen)

    @property
    def bare(self) -> Chunks:
        """All chunks, the open one last, for those who do not ask for moments."""
        return Chunks(self.moments[:, :, :0], *self.spans, self.rotary)

    def chunks(self, k: Tensor, upto: int | None = None) -> Chunks:
        """All chunks with the moments of `k [B, Hkv, Lk, D]`, the open one last; zeros for empty ones.

        The open one's are out of date if it begins at `upto` or later, where nobody looks. Variances are averaged
        over the two channels of a rotary plane, so that what a query makes of them does not depend on where position
        0 lies, as q k does not.
        """
        self.measure(k, upto)
        return Chunks(self.moments, *self.spans, self.rotary)

    def measure(
        self, k: Tensor, upto: int | None = None, add: Callable[[ChunkTable, Tensor], None] | None = None
    ) -> None:
        """Bring the moments up to date, the open chunk's by `add(self, k)` where it is given."""
        if self.measured < self.closed:
            starts = self.starts[:, self.moments.shape[2] - 1 :]
            length = F.pad(starts[:, 1:], (0, 1), value=self.closed) - starts
            sums = chunk_sums(k[:, :, : self.closed], starts, self.measured)
            new = self._stored(sums, length.clamp_min(1)[:, None, :, None])
            self.moments = torch.cat([self.moments[:, :, :-1], new, torch.zeros_like(new[:, :, :1])], 2)
            self.measured = self.closed
        if self.seen > self.closed and (upto is None or upto > self.closed):
            if self.moments.is_inference() and not torch.is_inference_mode_enabled():
                self.moments, self.open = self.moments.clone(), self.open.clone()
            (add or ChunkTable._add_open)(self, k)

    def _add_open(self, k: Tensor) -> None:
        new = k[:, :, self.added : self.seen].float()
        self.open, self.added = self.open + torch.cat([new.sum(2), new.square().sum(2)], -1), self.seen
        self.moments[:, :, -1] = self._stored(self.open, self.seen - self.closed)

    def _stored(self, sums: Tensor, length: Tensor | int) -> Tensor:
        stored, dtype = spread(sums, length, self.rotary), self.moments.dtype
        return stored.clamp(max=min(torch.finfo(dtype).max, torch.finfo(stored.dtype).max)).to(dtype)

    def forget(self) -> None:
        """Drop the moments of closed chunks; they are measured anew, from the keys, when next asked for."""
        self.moments, self.measured = self.moments[:, :, -1:].clone(), 0

    def close(self, stop: int, find: Finder, keys: int | None = None, most: int | None = None) -> None:
        """Cut tokens `closed .. stop`, of `keys` known, into at most `most` chunks.

        `find(start, stop)` gives flags `[B, stop - start]`.
        """
        if stop > self.closed:
            self.closings = (*self.closings, (keys or stop, stop, self.starts.shape[1]))
            self.starts = torch.cat([self.starts, to_list(find(self.closed, stop), self.closed, most)], 1)
        self.closed = self.seen = self.added = stop
        self.open = torch.zeros_like(self.open)
        self.moments = F.pad(self.moments[:, :, :-1], (0, 0, 0, 1))

    def grow(self, start: int, stop: int) -> None:
        """Let the open chunk take tokens `start .. stop`; those from `start` on that it had, the cache has dropped."""
        if start < self.added:
            self.open, self.added = torch.zeros_like(self.open), self.closed
        self.seen = stop

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on, and the chunks closed when they were known."""
        if length >= self.seen:
            return
        while self.closings and self.closings[-1][0] > length:
            self.starts = self.starts[:, : self.closings[-1][2]]
            self.closings = self.closings[:-1]
        closed = self.closings[-1][1] if self.closings else 0
        if closed < self.closed:
            self.closed = closed
            self.forget()
        self.open, self.added, self.seen = torch.zeros_like(self.open), self.closed, max(length, self.closed)

    def reorder(self, index: Tensor) -> ChunkTable:
        """The table of batch rows `index`, as beams move."""
        index = index.to(self.starts.device)
        starts, moments, open = self.starts[index], self.moments[index], self.open[index]
        return replace(self, starts=starts, moments=moments, open=open)
