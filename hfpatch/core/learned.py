"""Learned tensors: what a method says it takes, and the check of what it is given against the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..values import shown

LARGEST = 1e6


@dataclass(frozen=True)
class ModelSizes:
    """What the shapes of learned tensors are measured by; None where the model's config does not tell.

    `query_dim` is the width of a query, `value_dim` that of a head's output, `hidden` that of an attention module's
    input.
    """

    layers: int
    heads: int | None
    query_dim: int | None
    value_dim: int | None
    hidden: int | None
    dtype: torch.dtype


Shape = tuple[int | None, ...]


class Learned:
    """One tensor a method takes: its shapes (None: any size), the range of its entries, and what must come with it.

    Floating-point unless `whole`. Entries are finite by their range; far larger ones than `LARGEST` overflow.
    """

    def __init__(
        self,
        *shapes: Shape,
        ge: float = -LARGEST,
        le: float = LARGEST,
        whole: bool = False,
        along: tuple[str, ...] = (),
    ) -> None:
        self.shapes, self.ge, self.le, self.whole, self.along = shapes, ge, le, whole, along

    def wrong(self, t: Tensor, dtype: torch.dtype) -> str | None:
        """What keeps `t` from serving a model of this dtype, or None."""
        kind = "whole numbers" if self.whole else "floating-point numbers"
        shapes = " or ".join("[" + ", ".join("any" if n is None else str(n) for n in s) + "]" for s in self.shapes)
        what = f"is {str(t.dtype).removeprefix('torch.')} {list(t.shape)}; for this model it takes {kind} {shapes}"
        if t.layout != torch.strided or t.is_meta or t.is_quantized or t.is_nested:
            return "is not a plain tensor with its numbers in memory"
        integer = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
        if not (integer if self.whole else t.is_floating_point()):
            return what
        if not any(_same(t.shape, s) for s in self.shapes):
            return what
        most = torch.finfo(torch.float32 if self.whole else dtype).max
        start, end = max(self.ge, -most), min(self.le, most)
        low, high = (float(n) for n in t.detach().to(torch.int64 if self.whole else torch.float32).aminmax())
        if not (low >= start and high <= end):
            return f"holds numbers from {low:g} to {high:g}; they must lie between {start:g} and {end:g}"
        return None


def _same(shape: torch.Size, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(n > 0 and w in (None, n) for n, w in zip(shape, wanted, strict=True))


def check_tensors(
    who: str, given: Mapping[str, Tensor], takes: Mapping[str, Learned] | None, dtype: torch.dtype
) -> None:
    """Raise ConfigError at the first of the `given` tensors that is not as `takes` says; None says nothing."""
    if takes is None:
        return
    for name, wanted in takes.items():
        if name not in given:
            continue
        missing = next((other for other in wanted.along if other not in given), None)
        if missing is not None:
            raise ConfigError(f"{who}: the tensor {name} needs {missing} beside it; save both.")
        if wrong := wanted.wrong(given[name], dtype):
            raise ConfigError(f"{who}: the tensor {name} {wrong}.")
    stray = next((name for name in given if name not in takes), None)
    if stray is not None:
        known = ", ".join(dict.fromkeys(re.sub(r"\d+", "N", name) for name in takes))
        raise ConfigError(
            f"{who}: a tensor {shown(stray)} does not belong to this method on this model; "
            + (f"it takes {known}." if known else "it takes none.")
        )
