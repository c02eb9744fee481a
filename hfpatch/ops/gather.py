"""Picking tokens of keys and values, per head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowGather:
    """`x [B, H, L, D]` as a flat table of rows, so that picking tokens per head is one copy per token."""

    table: Tensor
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor) -> RowGather:
        """A view where strides allow it, else a copy of x."""
        d = x.shape[-1]
        if x.stride(-1) != 1 or x.requires_grad or any(s % d for s in x.stride()[:3]):
            x = x.contiguous()
        b, h, t = (s // d for s in x.stride()[:3])
        last = sum((n - 1) * s for n, s in zip(x.shape[:3], (b, h, t), strict=True))
        return cls(x.as_strided((last + 1, d), (d, 1)), (b, h, t))

    def places(self, b: int | Tensor, h: Tensor, tokens: Tensor) -> Tensor:
        """Where token `tokens [...]` of batch row b and head `h` lies in the table, broadcast against tokens."""
        sb, sh, st = self.strides
        return tokens * st + (h * sh + b * sb)

    def rows(self, places: Tensor) -> Tensor:
        """Rows `[..., D]` of the table."""
        return self.table.index_select(0, places.flatten()).unflatten(0, places.shape)


def take(k: RowGather, v: RowGather, b: int | Tensor, h: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens of keys and values, which mostly lie alike: `[..., D]`, `[..., Dv]`."""
    places = k.places(b, h, tokens)
    return k.rows(places), v.rows(places if k.strides == v.strides else v.places(b, h, tokens))
