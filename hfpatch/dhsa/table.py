"""The chunk table of one layer and cache: boundaries, chunk representations, and the open chunk of new tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .boundaries import to_list
from .rotary import Rotary

Finder = Callable[[int, int], Tensor]
ALL = Rotary()


def chunk_sums(k: Tensor, starts: Tensor, first: int) -> Tensor:
    """Float32 sums `[B, Hkv, C, 2 D]` of k and of k squared over chunks that begin at `starts [B, C]`.

    Tokens `first ..` of `k [B, Hkv, Lk, D]`. One pass for ragged rows: their chunks are bags of consecutive entries
    of one flat table, head by head to keep the copy in float32 small.
    """
    b, heads, _, d = k.shape
    n = k.shape[2] - first
    row = torch.arange(b, device=k.device)[:, None] * n
    offsets, every = (starts - first + row).flatten(), torch.arange(b * n, device=k.device)
    out = k.new_empty((b, heads, starts.shape[1], 2 * d), dtype=torch.float32)
    for h in range(heads):
        flat = k[:, h, first:].float().reshape(b * n, d)
        for part, x in enumerate((flat, flat.square())):
            sums = F.embedding_bag(every, x, offsets, mode="sum")
            out[:, h, :, part * d : (part + 1) * d] = sums.view(b, -1, d)
    return out


@dataclass(eq=False)
class ChunkTable:
    """Chunks of the rows' first `closed` tokens; tokens `closed .. seen` form one open chunk.

    `starts [B, C]`; rows with fewer chunks are padded with empty ones. `moments [B, Hkv, C + 1, 2 D]` are means and
    variances of the keys, the open chunk's last, and `open [B, Hkv, 2 D]` sums of its keys and their squares, in
    float32.
    """

    starts: Tensor
    moments: Tensor
    open: Tensor
    rotary: Rotary = ALL
    closed: int = 0
    seen: int = 0

    @classmethod
    def empty(cls, k: Tensor, rotary: Rotary = ALL) -> ChunkTable:
        """A table without tokens for keys like `k [B, Hkv, L, D]`."""
        b, h, _, d = k.shape
        return cls(
            torch.zeros(b, 0, dtype=torch.long, device=k.device),
            torch.zeros(b, h, 1, 2 * d, device=k.device),
            torch.zeros(b, h, 2 * d, device=k.device),
            rotary,
        )

    @property
    def spans(self) -> tuple[Tensor, Tensor]:
        """First token and one past the last of every chunk, `[B, C + 1]`, the open one last."""
        starts = F.pad(self.starts, (0, 1), value=self.closed)
        return starts, F.pad(starts[:, 1:], (0, 1), value=self.seen)

    def statistics(self) -> Tensor:
        """Means and variances of the keys of every chunk, `[B, Hkv, C + 1, 2 D]`; zeros for empty chunks.

        Variances are averaged over the two channels of a rotary plane, so that what a query makes of them does not
        depend on where position 0 lies, as q k does not.
        """
        if self.seen > self.closed:
            if self.moments.is_inference() and not torch.is_inference_mode_enabled():
                self.moments = self.moments.clone()
            length = self.open.new_full((1,), self.seen - self.closed)
            self.moments[:, :, -1] = self._spread(self.open, length)
        return self.moments

    def _spread(self, sums: Tensor, length: Tensor) -> Tensor:
        mean, square = (sums / length).chunk(2, -1)
        variance = (square - mean.square()).clamp_min_(0)
        other = self.rotary.partner(mean.shape[-1], mean.device)
        return torch.cat([mean, (variance + variance.index_select(-1, other)) / 2], -1)

    def close(self, k: Tensor, find: Finder) -> None:
        """Cut tokens `closed .. Lk` of `k [B, Hkv, Lk, D]` into chunks; `find(start, stop)` gives flags `[B, n]`."""
        stop = k.shape[2]
        if stop > self.closed:
            starts = to_list(find(self.closed, stop), self.closed)
            length = F.pad(starts[:, 1:], (0, 1), value=stop) - starts
            new = self._spread(chunk_sums(k, starts, self.closed), length.clamp_min(1)[:, None, :, None])
            self.moments = torch.cat([self.moments[:, :, :-1], new, torch.zeros_like(new[:, :, :1])], 2)
            self.starts = torch.cat([self.starts, starts], 1)
        self.closed = self.seen = stop
        self.open = torch.zeros_like(self.open)

    def grow(self, k: Tensor) -> None:
        """Let the open chunk reach to the end of `k [B, Hkv, Lk, D]`; forgets open tokens the cache has dropped."""
        stop = k.shape[2]
        if self.seen == stop - 1:
            last = k[:, :, -1].float()
            self.open = self.open + torch.cat([last, last.square()], -1)
        else:
            new = k[:, :, self.closed :].float()
            self.open = torch.cat([new.sum(2), new.square().sum(2)], -1)
        self.seen = stop

    def reorder(self, index: Tensor) -> ChunkTable:
        """The table of batch rows `index`, as beams move."""
        index = index.to(self.starts.device)
        moments, open = self.moments[index], self.open[index]
        return ChunkTable(self.starts[index], moments, open, self.rotary, self.closed, self.seen)
