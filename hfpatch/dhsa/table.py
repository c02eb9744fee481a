"""The chunk table of one layer and cache: boundaries, chunk representations, and the open chunk of new tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .boundaries import to_list

Finder = Callable[[int, int], Tensor]


def chunk_sums(k: Tensor, starts: Tensor, first: int) -> Tensor:
    """Float32 sums `[B, Hkv, C, D]` of the tokens `first ..` of `k [B, Hkv, Lk, D]` over chunks from `starts [B, C]`.

    One pass over the keys for ragged rows: every row's chunks are bags of consecutive entries of one flat table.
    """
    k = k[:, :, first:]
    b, h, n, d = k.shape
    flat = k.permute(0, 2, 1, 3).reshape(b * n, h * d).float()
    row = torch.arange(b, device=k.device)[:, None] * n
    every = torch.arange(b * n, device=k.device)
    sums = F.embedding_bag(every, flat, (starts - first + row).flatten(), mode="sum")
    return sums.view(b, -1, h, d).transpose(1, 2)


@dataclass(eq=False)
class ChunkTable:
    """Chunks of the rows' first `closed` tokens; tokens `closed .. seen` form one open chunk.

    `starts [B, C]`; rows with fewer chunks are padded with empty ones. `sums [B, Hkv, C, D]` of the closed chunks'
    keys and `open [B, Hkv, D]` of the open one's, in float32.
    """

    starts: Tensor
    sums: Tensor
    open: Tensor
    closed: int = 0
    seen: int = 0
    _scaled: Tensor | None = None

    @classmethod
    def empty(cls, k: Tensor) -> ChunkTable:
        """A table without tokens for keys like `k [B, Hkv, L, D]`."""
        b, h, _, d = k.shape
        return cls(
            torch.zeros(b, 0, dtype=torch.long, device=k.device),
            torch.zeros(b, h, 0, d, device=k.device),
            torch.zeros(b, h, d, device=k.device),
        )

    @property
    def spans(self) -> tuple[Tensor, Tensor]:
        """First token and one past the last of every chunk, `[B, C + 1]`, the open one last."""
        starts = F.pad(self.starts, (0, 1), value=self.closed)
        return starts, F.pad(starts[:, 1:], (0, 1), value=self.seen)

    def represent(self) -> Tensor:
        """`sqrt(len) * mean(k)` of every chunk, `[B, Hkv, C + 1, D]`, the open one last; zeros for empty chunks."""
        starts, ends = self.spans
        root = (ends - starts).clamp_min(1).rsqrt()
        if self._scaled is None:
            self._scaled = self.sums * root[:, None, :-1, None]
        return torch.cat([self._scaled, (self.open * root[:, -1:, None])[:, :, None]], 2)

    def close(self, k: Tensor, find: Finder) -> None:
        """Cut tokens `closed .. Lk` of `k [B, Hkv, Lk, D]` into chunks; `find(start, stop)` gives flags `[B, n]`."""
        stop = k.shape[2]
        if stop > self.closed:
            starts = to_list(find(self.closed, stop), self.closed)
            self.sums = torch.cat([self.sums, chunk_sums(k, starts, self.closed)], 2)
            self.starts = torch.cat([self.starts, starts], 1)
        self.closed = self.seen = stop
        self.open = torch.zeros_like(self.open)
        self._scaled = None

    def grow(self, k: Tensor) -> None:
        """Let the open chunk reach to the end of `k [B, Hkv, Lk, D]`; forgets open tokens the cache has dropped."""
        stop = k.shape[2]
        if self.seen == stop - 1:
            self.open = self.open + k[:, :, -1]
        else:
            self.open = k[:, :, self.closed :].sum(2, dtype=torch.float32)
        self.seen = stop

    def reorder(self, index: Tensor) -> ChunkTable:
        """The table of batch rows `index`, as beams move."""
        index = index.to(self.starts.device)
        return ChunkTable(self.starts[index], self.sums[index], self.open[index], self.closed, self.seen)
