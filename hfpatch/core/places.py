"""Sets of keys that a cache keeps for good, and building them from scores."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """The keys of a call that stay in the cache: `index [B, H, n]`, ascending, H the cache's heads or 1.

    All of them hold the last `recent` keys, so many tokens can still be taken back. The cache has `room` for new keys
    before it grows.
    """

    index: Tensor
    recent: int = 0
    room: int = 128


def best_places(scores: Tensor, count: int, sink: int, window: int) -> Tensor:
    """Index `[B, H, count]` of the first `sink` keys, the last `window` and the best between, in order of position.

    `scores [B, H, L - window]` are of all keys but the window's; of equal ones the earlier key is kept.
    """
    length = scores.shape[-1]
    ranked = scores[..., sink:].sort(dim=-1, descending=True, stable=True).indices
    best = ranked[..., : count - sink - window].sort(dim=-1).values + sink
    ends = [torch.arange(*ends, device=scores.device) for ends in ((0, sink), (length, length + window))]
    first, last = (x.expand(*best.shape[:2], -1) for x in ends)
    return torch.cat([first, best, last], dim=-1)


def pyramid(budget: int, always: int, length: int, place: int, layers: int) -> int:
    """Tokens for layer `place` of `layers`: many in the first, few in the last, `budget` on average (PyramidKV).

    Of these `always` are kept anyway; no layer gets more than `length`.
    """
    mean = budget - always
    low, room = mean // 20, length - always
    high = 2 * mean - low
    if high > room:
        low, high = 2 * mean - room, room
    if layers < 2 or not 0 <= low <= high:
        return budget
    return round(high - place * (high - low) / (layers - 1)) + always
