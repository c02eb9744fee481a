"""A decode step inside a graph of torch.compile, where lengths, padding and positions are tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.call import AttentionCall
from ..core.logits import capped
from ..core.method import Method
from ..core.selection import SinkWindow
from .cache_slot import has_room, layers_of
from .raw_call import RawCall


def compiles(raw: RawCall, methods: Sequence[Method]) -> bool:
    """Whether the call is one decode step under methods that choose by positions alone."""
    return raw.q.shape[2] == 1 and all(m.positional and m.points() == {"select"} for m in methods)


def compiled_step(raw: RawCall, methods: Sequence[Method]) -> Tensor:
    """Out `[B, 1, Hq, Dv]` of dense attention under the model's mask and the methods' rules."""
    if not methods or (raw.mask is not None and not isinstance(raw.mask, Tensor)):
        return raw.base()[0]
    rows, keys, device = raw.q.shape[0], raw.k.shape[2], raw.q.device
    last = _total(raw) - 1
    j = torch.arange(keys, device=device)
    seen = (j <= last).expand(rows, 1, 1, keys)
    start: Any = 0
    if raw.mask is not None:
        given = raw.mask if raw.mask.dtype == torch.bool else raw.mask == 0
        seen = seen & given[..., :keys]
        start = seen[:, 0, 0].int().argmax(-1)[:, None]
    call = AttentionCall(0, 1, "decode", raw.q, raw.k, raw.v, raw.scale, rows=tuple(range(rows)))
    for m in methods:
        selection = m.select(call)
        if isinstance(selection, SinkWindow):
            seen = seen & selection.keep(last - start, j - start).view(-1, 1, 1, keys)
    return _attend(raw, seen)


def _total(raw: RawCall) -> Any:
    """Tokens seen: a number, or the counter of a static cache, which a graph must not turn into a number."""
    if raw.cache is None or not has_room(raw.cache, raw.slot, raw.k.shape[2]):
        return raw.k.shape[2]
    return layers_of(raw.cache)[raw.slot].get_seq_length()  # type: ignore[index]


def _attend(raw: RawCall, seen: Tensor) -> Tensor:
    groups = raw.q.shape[1] // raw.k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (raw.k, raw.v))
    logits = capped((raw.q @ k.mT).float() * raw.scale, raw.softcap).masked_fill(~seen, -torch.inf)
    if raw.sinks is not None:
        column = raw.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)
