"""Picking tokens of keys and values, per head."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowGather:
    """`x [B, H, L, D]` as a flat table of rows, so that picking tokens per head is one copy per token."""

    table: Tensor
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor) -> "RowGather":
        """A view where strides allow it, else a copy of x."""
        d = x.shape[-1]
        if x.stride(-1) != 1 or x.requires_grad or any(s % d for s in x.stride()[:3]):
            x = x.contiguous()
        b, h, t = (s // d for s in x.stride()[:3])
        last = sum((n - 1) * s for n, s in zip(x.shape[:3], (b, h, t), strict=True))
        return cls(x.as_strided((last + 1, d), (d, 1)), (b, h, t))

    def take(self, b: int | Tensor, h: Tensor, tokens: Tensor) -> Tensor:
        """Rows `[..., D]` of token `tokens [...]`, batch row b and head `h`, broadcast against tokens."""
        sb, sh, st = self.strides
        flat = tokens * st + (h * sh + b * sb)
        return self.table.index_select(0, flat.flatten()).unflatten(0, flat.shape)
