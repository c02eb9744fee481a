"""Softmax over disjoint sets of keys, put together from `(out, lse)` of each set."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]


def lse_of(total: Tensor, top: Tensor) -> Tensor:
    """`log(total) + top`, -inf where nothing was summed, with gradients that stay finite there."""
    tiny = torch.finfo(total.dtype).tiny
    return torch.where(total > 0, total.clamp_min(tiny).log() + top, -torch.inf)


def weights(lses: Sequence[Tensor], sinks: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Share of every part in the whole softmax, and its lse; `sinks` broadcasts to the shape of a lse."""
    every = list(lses) if sinks is None else [*lses, sinks.to(lses[0].dtype).expand_as(lses[0])]
    top = reduce(torch.maximum, every).detach()
    top = top.masked_fill(top.isneginf(), 0.0)
    powers = [torch.exp(lse - top) for lse in every]
    total = reduce(torch.add, powers)
    scale = total.clamp_min(torch.finfo(total.dtype).tiny).reciprocal()
    return [p * scale for p in powers[: len(lses)]], lse_of(total, top)


def merge(parts: Sequence[Part], sinks: Tensor | None = None) -> Part:
    """`(out [..., Dv], lse [...])` of the union of disjoint parts, in float32; sinks enter the denominator only."""
    share, total = weights([lse for _, lse in parts], sinks)
    out = parts[0][0] * share[0][..., None]
    for (o, _), w in zip(parts[1:], share[1:], strict=True):
        out = torch.addcmul(out, o.to(out.dtype), w[..., None])
    return out, total


def mix(a: Part, b: Part) -> Part:
    """`merge` of two parts in one pass, in their dtype, without gradients; `out` must be 0 where lse is -inf."""
    share = (b[1] - a[1]).sigmoid_().nan_to_num_(0.0)
    return torch.lerp(a[0], b[0].to(a[0].dtype), share.to(a[0].dtype)[..., None]), torch.logaddexp(a[1], b[1])
