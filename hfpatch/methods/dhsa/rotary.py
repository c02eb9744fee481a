"""Which channels of a key turn with its position, and in which planes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Channels RoPE turns: the first `share` of them, or the last `tail` in latent attention.

    They are paired by halves, or with their neighbours if `interleaved`.
    """

    share: float = 1.0
    tail: int = 0
    interleaved: bool = False

    @classmethod
    def of(cls, config: Any, scope: Mapping[str, Any]) -> "Rotary":
        """As a model's text config and its modeling file's names say; all channels where they say nothing."""
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        share = rope.get("partial_rotary_factor") or 1.0
        if turned := getattr(config, "rotary_dim", None):
            share = turned / (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        return cls(share, getattr(config, "qk_rope_head_dim", None) or 0, _interleaved(scope))

    def fold(self, x: Tensor) -> Tensor:
        """Add up the two channels of every plane; channels that do not turn stay.

        `x [..., D]` -> `[..., P]` with P planes and still channels.
        """
        d = x.shape[-1]
        turned = self.tail or int(d * self.share)
        start, half = (d - turned if self.tail else 0), turned // 2
        stop = start + 2 * half
        pairs = x[..., start:stop].unflatten(-1, (half, 2) if self.interleaved else (2, half))
        return torch.cat([x[..., :start], pairs.sum(-1 if self.interleaved else -2), x[..., stop:]], -1)


def _interleaved(scope: Mapping[str, Any]) -> bool:
    """Whether the modeling file with these names turns a channel with its neighbour: tried out, or done by complex."""
    for name in ("rotate_half", "rotate_every_two"):
        if name in scope:
            turned = scope[name](torch.eye(8)[:1].view(1, 1, 1, 8))
            return bool(turned[0, 0, 0, 1] != 0)
    turn = scope.get("apply_rotary_emb")
    return turn is not None and "view_as_complex" in turn.__code__.co_names
