"""Expected Attention: the keys that queries still to come can be expected to attend to stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from ..config.method_config import option
from ..config.registry import register_method
from ..core.call import AttentionCall
from ..core.evicting import Evicting, KeepConfig
from ..core.last_queries import LastQueries
from ..core.places import Places
from ..errors import UnsupportedModelError
from ..runtime.rotation import Rotation

_QUERIES = "expected"
CLOSE = 0.05  # of a query's length: what rounding of half precision leaves


@dataclass(kw_only=True)
class ExpectedConfig(KeepConfig):
    """Settings of `expected`; sizes in tokens."""

    method: ClassVar[str] = "expected"
    future: int = option(512, "positions after the prompt that coming queries are expected at", ge=1, le=1 << 20)
    queries: int = option(128, "last queries that stand for those to come when a decode step drops keys", ge=2)
    covariance: bool = option(True, "count how much queries differ, not their mean alone")


@register_method
class Expected(Evicting[ExpectedConfig]):
    """Attention that a normal distribution of queries would pay each key, times the length of its value.

    Expected Attention, arXiv 2510.00636. Mean and covariance are those of the call's queries before RoPE, without the
    sinks, turned to the mean over the next `future` positions by the model's own rotary embedding; decode steps go by
    their last queries. As in its code, soft-caps are left out and nothing is added to the weights.
    """

    summary = "keeps the keys that later queries are expected to attend to"
    paper = "https://arxiv.org/abs/2510.00636"

    def __init__(self, config: ExpectedConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.needs = self.needs | {"q_pre_rope"}
        self.stateful = config.evict != "prompt"
        self.rotation: Rotation | None = None

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        super().prepare(model, layers)
        self.rotation = Rotation.of(model, self.name)

    def _retain(self, call: AttentionCall) -> Places | None:
        if self.stateful:
            last = call.state.setdefault(_QUERIES, LastQueries())
            last.add(_before_rope(call).detach(), call.Lk, self.config.queries)
        return super()._retain(call)

    def scores(self, call: AttentionCall) -> Tensor:
        c = self.config
        mean, spread = self._queries(call)
        wanted, eye = self._turned(call, mean, torch.eye(call.q.shape[-1], device=call.q.device))
        parts = []
        for kv in range(call.Hkv):
            heads, k = slice(kv * call.groups, (kv + 1) * call.groups), call.k[:, kv, c.sink :].float()
            logits = call.scale * wanted[:, heads] @ k.mT  # [B, G, n]
            if c.covariance:
                turned = eye.mT @ spread[:, heads] @ eye  # [B, G, D, D]
                logits = logits + call.scale**2 / 2 * ((k[:, None] @ turned) * k[:, None]).sum(-1)
            parts.append(logits.softmax(-1).mean(1))
        weights = torch.stack(parts, 1) * vector_norm(call.v[:, :, c.sink :].float(), dim=-1)  # [B, Hkv, n]
        weights = torch.nn.functional.pad(weights, (c.sink, 0))
        return weights.unflatten(1, (call.Hc, -1)).mean(2)[..., : call.Lk - c.window]

    def _queries(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Mean `[B, Hq, D]` and covariance `[B, Hq, D, D]` of queries before RoPE that stand for those to come."""
        q = _before_rope(call)
        if call.seen == call.Lq:
            q = q[:, :, min(self.config.sink, call.Lq - 1) :]
        elif call.Lq == 1:
            q = call.state[_QUERIES].queries
        q = q.float()
        mean = q.mean(2, keepdim=True)
        return mean[:, :, 0], (q - mean).mT @ (q - mean) / q.shape[2]

    def _turned(self, call: AttentionCall, mean: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
        """`mean [B, Hq, D]` and the rows of `eye [D, D]` turned to the mean of the positions to come."""
        assert self.rotation is not None
        first = self._position(call)
        if first is None:  # a layer without positions
            return mean, eye
        turn = self.rotation.at(torch.arange(first, first + self.config.future, device=eye.device), eye)
        return self.rotation.turn(mean[:, :, None], turn)[:, :, 0], self.rotation.turn(eye[None, None], turn)[0, 0]

    def _position(self, call: AttentionCall) -> int | None:
        """The position after the last query's; None where queries are not turned. Raises UnsupportedModelError."""
        assert self.rotation is not None
        q, before = call.q[:, :, -1:].float(), _before_rope(call)[:, :, -1:].float()
        start, room = 0 if call.held is None else call.held.start, CLOSE * vector_norm(q)
        for position in dict.fromkeys((call.seen - 1, call.seen - 1 + start)):  # padding counts where none is named
            turn = self.rotation.at(torch.tensor([position], device=q.device), q)
            if vector_norm(self.rotation.turn(before, turn) - q) <= room:
                return position + 1
        if vector_norm(before - q) <= room:
            return None
        raise UnsupportedModelError(
            f"expected: queries of layer {call.layer} do not turn by their place in the text as the model's rotary "
            "embedding does; use keydiff or snapkv."
        )


def _before_rope(call: AttentionCall) -> Any:
    """Queries before RoPE `[B, Hq, Lq, D]`. Raises UnsupportedModelError."""
    if call.q_pre_rope is None or call.q_pre_rope.shape[-1] != call.q.shape[-1]:
        raise UnsupportedModelError(f"expected: layer {call.layer} gave no queries before RoPE.")
    return call.q_pre_rope.transpose(1, 2)
