"""SnapKV: the keys that the last queries of a prompt attended to stay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..config.method_config import option
from ..config.registry import register_method
from ..core.call import AttentionCall
from ..core.evicting import Evicting, KeepConfig
from ..core.last_queries import LastQueries
from ..core.logits import causal, logits, weights
from ..core.places import Places
from ..errors import ConfigError

_QUERIES = "snapkv"
CHUNK_ELEMENTS = 1 << 24


@dataclass(kw_only=True)
class SnapKVConfig(KeepConfig):
    """Settings of `snapkv`."""

    method: ClassVar[str] = "snapkv"
    kernel: int = option(5, "neighbouring keys whose scores are pooled, the key itself included; odd", ge=1)
    pooling: str = option("average", "how they are pooled", choices=("average", "max"))

    def validate(self) -> None:
        super().validate()
        if self.kernel % 2 == 0:
            raise ConfigError(f"snapkv: kernel={self.kernel} has no middle; make it odd.")


@register_method
class SnapKV(Evicting[SnapKVConfig]):
    """Attention of the last `window` queries to each key, pooled over neighbours, mean over the heads of a KV group.

    SnapKV, arXiv 2404.14469. Unlike its code: sets of KV heads instead of query heads, in order of position; at the
    ends of the prompt the pool averages over the neighbours there are; sinks are kept; later turns and padded rows
    are served. Decode steps, which the paper leaves alone, are scored by the queries since the last drop, `window` at
    most. What was asked must stand in the window: keys for another question are gone.
    """

    summary = "keeps the keys that the last queries attended to"
    paper = "https://arxiv.org/abs/2404.14469"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "rocket-prompt": {"window": 32, "kernel": 63, "pooling": "max", "budget": 2048},
    }

    def __init__(self, config: SnapKVConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.stateful = config.evict != "prompt"

    def scores(self, call: AttentionCall) -> Tensor:
        c, (q, groups) = self.config, (self._queries(call), call.groups)
        step = max(1, CHUNK_ELEMENTS // (call.B * groups * q.shape[2] * call.Lk))
        parts = []
        for first in range(0, call.Hkv, step):
            kv = slice(first, first + step)
            parts.append(self._received(call, q, kv, slice(first * groups, (first + step) * groups)))
        received = torch.cat(parts, 1)[..., : call.Lk - c.window]  # [B, Hq, n]
        reach = min(c.kernel // 2, received.shape[-1])
        if c.pooling == "max":
            pooled = max_pool1d(received, 2 * reach + 1, 1, reach)
        else:
            pooled = avg_pool1d(received, 2 * reach + 1, 1, reach, count_include_pad=False)
        return pooled.unflatten(1, (call.Hc, -1)).mean(2)

    def _received(self, call: AttentionCall, q: Tensor, kv: slice, heads: slice) -> Tensor:
        """Mean attention `[B, H, Lk]` of the queries `q [B, Hq, w, D]`, the last ones, in some of the heads."""
        bias = call.bias if call.bias is None or call.bias.shape[1] == 1 else call.bias[:, heads]
        every = logits(q[:, heads].float(), call.k[:, kv].float(), scale=call.scale, softcap=call.softcap, bias=bias)
        past = causal(every, call.k_pos[-q.shape[2] :], call.k_pos)
        return weights(past, None if call.sinks is None else call.sinks[heads]).mean(2)

    def _queries(self, call: AttentionCall) -> Tensor:
        """The last queries `[B, Hq, w, D]` there are, `window` at most."""
        known: LastQueries | None = call.state.get(_QUERIES) if self.stateful else None
        return call.q[:, :, -self.config.window :] if known is None else known.queries

    def _retain(self, call: AttentionCall) -> Places | None:
        if self.stateful:
            call.state.setdefault(_QUERIES, LastQueries()).add(call.q.detach(), call.Lk, self.config.window)
        return super()._retain(call)
