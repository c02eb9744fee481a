"""KeyDiff: keys that point elsewhere than the average key stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..config.method_config import option
from ..config.registry import register_method
from ..core.call import AttentionCall
from ..core.evicting import Evicting, KeepConfig


@dataclass(kw_only=True)
class KeyDiffConfig(KeepConfig):
    """Settings of `keydiff`."""

    method: ClassVar[str] = "keydiff"
    evict: str = option("both", "when keys are dropped", choices=("prompt", "decode", "both"))


@register_method
class KeyDiff(Evicting[KeyDiffConfig]):
    """Minus the cosine between a key and the mean direction of all keys, in each head of the cache.

    KeyDiff, arXiv 2504.15364. Keys as they are cached, after RoPE; no queries, so a prompt read in chunks of
    `interval` tokens or more is scored chunk by chunk and never held whole. Sink and window are not the paper's.
    Latent caches (MLA) are scored as they are, with the rotated part.
    """

    summary = "drops keys that resemble the average key"
    paper = "https://arxiv.org/abs/2504.15364"

    def scores(self, call: AttentionCall) -> Tensor:
        keys = call.cached
        scores = torch.stack([_difference(keys[:, head].float()) for head in range(keys.shape[1])], 1)
        return scores[..., : call.Lk - self.config.window]


def _difference(keys: Tensor) -> Tensor:
    """Scores `[B, L]` of `keys [B, L, D]`."""
    directions = normalize(keys, dim=-1)
    mean = normalize(directions.mean(1, keepdim=True), dim=-1)  # [B, 1, D]
    return -(directions * mean).sum(-1)
