"""A decode step inside a graph of torch.compile, as methods see it: fixed shapes, lengths and padding in tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call import AttentionCall
from .selection import Layout


@dataclass(eq=False)
class GraphStep:
    """One query per row and every slot of a cache, of which those after `last` are not written yet.

    `call` has q `[B, Hq, 1, D]` and all slots as k `[B, Hkv, C, D]`, v. Position p of a row lies in slot
    `start + p`; `start [B|1, 1]` is its first real token, `last` the slot of the query. `state` holds the tensors
    that `Method.graph_state` made for all rows; a graph may change them in place.
    """

    call: AttentionCall
    start: Tensor
    last: Any
    state: dict[str, Tensor]

    @property
    def capacity(self) -> int:
        """Slots of the cache."""
        return self.call.k.shape[2]

    @property
    def layout(self) -> Layout:
        """The step's sizes with all slots as keys."""
        (b, hq, lq, _), (_, hkv, lk, _) = self.call.q.shape, self.call.k.shape
        return Layout(b, hq, hkv, lq, lk, self.call.q.device)

    @property
    def length(self) -> Tensor:
        """Real tokens of each row so far, the query's own among them, `[B|1, 1]`."""
        return self.last + 1 - self.start

    def slots(self, at: Tensor) -> Tensor:
        """Slots `[B, H, W]` of the positions `at [B|1, H, W]`; of those beyond the cache some other."""
        slots = (at + self.start[..., None]).clamp(0, self.capacity - 1)
        return slots.expand(self.call.B, -1, -1)


@dataclass(eq=False)
class GraphKeys:
    """The keys that a step attends to: positions `at [B|1, H, W]`, and which of these count, `seen` of that shape.

    No position counts twice; W is the same in every step. Without `at`, `seen [B|1, H, C]` speaks of all slots.
    """

    at: Tensor | None
    seen: Tensor


def gathered(x: Tensor, slots: Tensor) -> Tensor:
    """`[B, max(H, Hkv), W, D]`: what `x [B, Hkv, C, D]` has in `slots [B, H, W]`, with H = 1, Hkv or Hq."""
    b, hkv = x.shape[:2]
    heads = max(hkv, slots.shape[1])
    rows = torch.arange(b, device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[:, None] // (heads // hkv)
    return x[rows, head, slots]
