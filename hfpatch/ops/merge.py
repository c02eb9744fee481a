"""Softmax over disjoint sets of keys, put together from `(out, lse)` of each set."""

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]


def weights(lses: Sequence[Tensor], sinks: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Share of every part in the whole softmax, and its lse; `sinks` broadcasts to the shape of a lse."""
    total = lses[0]
    for lse in lses[1:]:
        total = torch.logaddexp(total, lse)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total.dtype))
    base = total.masked_fill(total.isneginf(), 0.0)
    return [torch.exp(lse - base) for lse in lses], total


def merge(parts: Sequence[Part], sinks: Tensor | None = None) -> Part:
    """`(out [..., Dv], lse [...])` of the union of disjoint parts, in float32; sinks enter the denominator only."""
    share, total = weights([lse for _, lse in parts], sinks)
    out = parts[0][0] * share[0][..., None]
    for (o, _), w in zip(parts[1:], share[1:], strict=True):
        out = torch.addcmul(out, o.to(out.dtype), w[..., None])
    return out, total
