"""Reading the padding out of the mask the model made, and splitting a batch into rows without padding."""

from typing import Any

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


def length_with_groups(length: Tensor, mask: Any, batch: int, lq: int) -> int:
    """The number in `length` (no dimensions); of a decode step on a GPU its mask is read with it, in one wait.

    `row_groups` then knows its answer for that mask.
    """
    one = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape[:-1] == (batch, 1, lq) and lq == 1
    if not one or length.device.type == "cpu" or mask.device != length.device:
        return int(length)
    total, *numbers = torch.cat([length.reshape(1), _extents(mask[:, 0, 0]).flatten()]).tolist()
    if mask.shape[-1] >= total >= max(numbers[1::3]):
        _last.put(mask, (batch, lq, total), _groups(numbers))
    return int(total)


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
    found = _extents(valid.expand(batch, total)).flatten()
    if mask.ndim == 2 or (lq == 1 and mask.dtype == torch.bool):
        return _groups(found.tolist())
    *numbers, departs = torch.cat([found, _departs(mask, valid, total - lq)[None]]).tolist()  # one wait for both
    groups = _groups(numbers)
    return "a mask that is more than causality and padding" if departs and not isinstance(groups, str) else groups


def _groups(numbers: list[int]) -> list[RowSlice] | str:
    """Rows with the same extent; `numbers` are first, one past the last, and count of the valid keys, row by row."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (start, stop, count) in enumerate(zip(*[iter(numbers)] * 3, strict=True)):
        if count and stop - start != count:
            return "padding inside a row"
        groups.setdefault((start, stop) if count else (0, 0), []).append(row)
    return [RowSlice(tuple(rows), start, stop) for (start, stop), rows in groups.items()]


def _kept(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _extents(valid: Tensor) -> Tensor:
    """First, one past the last, and count of the valid keys of every row of `valid [B, L]`: `[B, 3]`."""
    first = valid.int().argmax(-1)
    stop = valid.shape[-1] - valid.flip(-1).int().argmax(-1)
    return torch.stack([first, stop, valid.sum(-1)], -1)


def _departs(mask: Tensor, valid: Tensor, off: int) -> Tensor:
    """Whether `mask [B, Lq, L]` is anything but causality from position `off` and `valid [B, L]` (no dimensions).

    Pad queries must see just that too, or everything: packed sequences before the last one look like padding else.
    """
    batch, lq, total = mask.shape
    j = torch.arange(total, device=mask.device)
    step = max(1, _CHUNK // max(1, total * batch))
    pieces: list[Tensor] = []
    for a in range(0, lq, step):
        i = torch.arange(off + a, off + min(a + step, lq), device=mask.device)
        part = mask[:, a : a + step]
        want = (j <= i[:, None]) & valid[:, None]
        wrong = _kept(part) != want
        if part.dtype != torch.bool:
            wrong |= (part != 0) & (part > torch.finfo(part.dtype).min / 2)
        pieces.append((wrong.any(-1) & (valid[:, i] | ~_kept(part).all(-1))).any())
        if mask.device.type == "cpu" and pieces[-1]:  # a GPU is not waited for piece by piece
            break
    return pieces[0] if len(pieces) == 1 else torch.stack(pieces).any()
