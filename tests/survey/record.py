"""What attention modules are given and what they do with it, seen from outside while a model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .oracle import Attend, Listener

PLAIN = 1e-4


@dataclass(frozen=True)
class Call:
    """One call of an attention function: the module, what it was given, and whether it was causal softmax attention.

    keywords: those with a value. shapes: of query, key and value.
    """

    module: nn.Module
    keywords: dict[str, Any]
    shapes: tuple[torch.Size, torch.Size, torch.Size]
    plain: bool


class Recorder(Listener):
    """Wraps attention functions and keeps their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def wrap(self, base: Attend) -> Attend:
        """`base`, recorded."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            out = base(module, query, key, value, attention_mask, **kwargs)
            whole = key.shape[2] == self.total or key.shape[2] == query.shape[2]
            plain = whole and is_plain(module, query, key, value, out[0], kwargs)
            self.calls.append(Call(module, kwargs, (query.shape, key.shape, value.shape), plain))
            return out

        return attend

    @property
    def plain(self) -> list[nn.Module]:
        """Modules whose calls were all plain, in the order they were called."""
        odd = {call.module for call in self.calls if not call.plain}
        return list(dict.fromkeys(call.module for call in self.calls if call.module not in odd))


def is_plain(module: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether `out [B, Lq, Hq, Dv]` is softmax attention of the last Lq tokens to all keys up to their own."""
    if q.shape[1] % k.shape[1]:
        return False
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scaling = kwargs.get("scaling")
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is not None and module.config._attn_implementation == "eager":
        logits = softcap * torch.tanh(logits / softcap)
    later = torch.ones(q.shape[2], k.shape[2]).triu(1 + k.shape[2] - q.shape[2]).bool()
    logits = logits.masked_fill(later, -torch.inf)
    sinks = kwargs.get("sinks") if sinks is None else sinks
    if sinks is not None:
        if sinks.numel() != q.shape[1]:
            return False
        logits = torch.cat([logits, sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    want = (logits.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)
    return want.shape == out.shape and bool((want - out).abs().max() <= PLAIN * want.abs().max())
