"""Sequences packed into one row, told by their positions alone."""

from torch import Tensor

from .last_answer import LastAnswer

_last: LastAnswer[bool] = LastAnswer()


def starts_again(positions: Tensor | None, asker: int | None = None) -> bool:
    """Whether positions `[B, Lq]` begin anew within a row; of several axes `[axes, B, Lq]`, whether the first falls.

    On the axes of images and videos tokens stand side by side, so there only a step back counts.
    """
    if not isinstance(positions, Tensor) or positions.shape[-1] < 2:
        return False
    return _last.of(positions, None, asker, lambda: _read(positions))


def _read(positions: Tensor) -> bool:
    if positions.ndim > 2:
        return bool((positions[0].diff(dim=-1) < 0).any())
    return bool((positions.diff(dim=-1) <= 0).any())
