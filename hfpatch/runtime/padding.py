"""Reading the padding out of the mask the model made, and splitting a batch into rows without padding."""

import torch
from torch import Tensor

from .last_answer import LastAnswer
from .row_slice import RowSlice

_CHUNK = 1 << 24
_last: "LastAnswer[list[RowSlice] | str]" = LastAnswer()


def row_groups(mask: Tensor | None, batch: int, lq: int, total: int, asker: int | None = None) -> list[RowSlice] | str:
    """Rows grouped by the range of their real tokens among `total` keys, or the reason why that is impossible.

    `mask` is None (causal, no padding), `[B, >=total]` of ones and zeros, or `[B, 1, Lq, >=total]` as bool
    (True = keep) or additive float. A 4-D mask that is anything but causality and padding gives a reason.
    The answer for the last mask is remembered, since all layers of a forward share one; `asker` is the layer.
    """
    if mask is None:
        return [RowSlice(tuple(range(batch)), 0, total)]
    return _last.of(mask, (batch, lq, total), asker, lambda: _read(mask, batch, lq, total))


def _read(mask: Tensor, batch: int, lq: int, total: int) -> list[RowSlice] | str:
    if mask.shape[-1] < total:
        return "the mask is shorter than the keys"
    if mask.ndim == 2:
        valid = mask[:, :total] != 0
    elif mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == lq:
        mask = mask[:, 0, :, :total]
        valid = _kept(mask[:, -1])
    else:
        return "a mask that differs between heads" if mask.ndim == 4 and mask.shape[1] > 1 else "an unusual mask"
    ranges = _ranges(valid.expand(batch, total))
    if isinstance(ranges, str):
        return ranges
    if mask.ndim == 3 and (lq > 1 or mask.dtype != torch.bool) and not _is_causal(mask, valid, total - lq):
        return "a mask that is more than causality and padding"
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (start, stop) in enumerate(ranges):
        groups.setdefault((start, stop), []).append(row)
    return [RowSlice(tuple(rows), start, stop) for (start, stop), rows in groups.items()]


def _kept(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _ranges(valid: Tensor) -> list[tuple[int, int]] | str:
    """First and one past the last valid key per row of `valid [B, L]`; a reason when a row has holes."""
    count = valid.sum(-1)
    first = valid.int().argmax(-1)
    stop = valid.shape[-1] - valid.flip(-1).int().argmax(-1)
    rows = torch.stack([first, stop, count], -1).tolist()
    if any(n and b - a != n for a, b, n in rows):
        return "padding inside a row"
    return [(a, b) if n else (0, 0) for a, b, n in rows]


def _is_causal(mask: Tensor, valid: Tensor, off: int) -> bool:
    """Whether `mask [B, Lq, L]` is causality from position `off` and `valid [B, L]`.

    Pad queries must see just that too, or everything: packed sequences before the last one look like padding else.
    """
    batch, lq, total = mask.shape
    j = torch.arange(total, device=mask.device)
    step = max(1, _CHUNK // max(1, total * batch))
    for a in range(0, lq, step):
        i = torch.arange(off + a, off + min(a + step, lq), device=mask.device)
        part = mask[:, a : a + step]
        want = (j <= i[:, None]) & valid[:, None]
        wrong = _kept(part) != want
        if part.dtype != torch.bool:
            wrong |= (part != 0) & (part > torch.finfo(part.dtype).min / 2)
        wrong_rows = wrong.any(-1) & (valid[:, i] | ~_kept(part).all(-1))
        if wrong_rows.any():
            return False
    return True
