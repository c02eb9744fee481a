"""Which channels of a key turn with its position, and in which planes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Channels RoPE turns, paired by halves: the first `share` of them, or the last `tail` in latent attention."""

    share: float = 1.0
    tail: int = 0

    @classmethod
    def of(cls, config: Any) -> "Rotary":
        """As a model's text config says; all channels where it says nothing."""
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        return cls(rope.get("partial_rotary_factor") or 1.0, getattr(config, "qk_rope_head_dim", None) or 0)

    def fold(self, x: Tensor) -> Tensor:
        """Add up the two channels of every plane; channels that do not turn stay.

        `x [..., D]` -> `[..., P]` with P planes and still channels.
        """
        d = x.shape[-1]
        turned = self.tail or int(d * self.share)
        start, half = (d - turned if self.tail else 0), turned // 2
        a, b, stop = x[..., start : start + half], x[..., start + half : start + 2 * half], start + 2 * half
        return torch.cat([x[..., :start], a + b, x[..., stop:]], -1)
