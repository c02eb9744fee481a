"""Rows of a batch and a range of positions in them."""

from typing import Any, NamedTuple

from torch import Tensor

from ..core.call import rows_on


class RowSlice(NamedTuple):
    """Batch rows, in order, and positions `start..stop`: their real tokens among all, or their queries in a call."""

    rows: tuple[int, ...]
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.stop - self.start

    def after(self, before: int) -> "RowSlice":
        """The same rows and positions counted from `before` on; what lies before it is left out."""
        return RowSlice(self.rows, max(self.start - before, 0), max(self.stop - before, 0))

    def part(self, first: int, count: int) -> "RowSlice":
        """`count` positions of these rows, from the one that is `first` here."""
        return RowSlice(self.rows, self.start + first, self.start + first + count)

    def take(self, x: Tensor, dim: int = 2) -> Tensor:
        """These rows and positions along `dim` of `x`; `x` itself where that is all of it."""
        if len(self.rows) != x.shape[0]:
            x = x[self._index(x)]
        return x if (self.start, self.stop) == (0, x.shape[dim]) else x.narrow(dim, self.start, self.length)

    def put(self, out: Tensor, part: Tensor) -> None:
        """Write `part [R, n, Hq, Dv]` to these rows and positions of `out [B, Lq, Hq, Dv]`."""
        out[self._index(out), self.start : self.stop] = part

    def covers(self, x: Tensor) -> bool:
        """Whether these are all rows and positions of `x [B, Lq, ...]`."""
        return (len(self.rows), self.start, self.stop) == (x.shape[0], 0, x.shape[1])

    def _index(self, x: Tensor) -> Any:
        """The rows as an index of `x [B, ...]`."""
        first, last = self.rows[0], self.rows[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else rows_on(x.device, self.rows)
