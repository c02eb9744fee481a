"""What a method sees of one attention call: real tokens only, padding already taken away."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .selection import Layout, Selection, pairs

Span = tuple[int, int] | None


@lru_cache(maxsize=1024)
def rows_on(device: torch.device, rows: tuple[int, ...]) -> Tensor:
    """Numbers of rows or heads `[n]` as an index on the device: kept, since a copy to a GPU is waited for."""
    with torch.inference_mode(False):  # a later call may be one of training
        return torch.tensor(rows, device=device)


class Forward:
    """What the layers of one forward pass of the model share; it lives as long as the pass."""

    def __init__(self) -> None:
        self.shared: dict[Any, Any] = {}


@dataclass(frozen=True, eq=False)
class Held:
    """What a cache holds of a call's rows: `heads` of its own, their content, and which tokens that is of.

    `start` tokens of the batch come before the rows' first, padding.
    """

    heads: int
    content: Callable[[], Tensor]
    places: Callable[[], Tensor | None]
    start: int = 0


@dataclass(eq=False)
class AttentionCall:
    """One layer call for rows that share their padding; query `n` sits at position `off + n`.

    q `[B, Hq, Lq, D]`, k `[B, Hkv, Lk, D]`, v `[B, Hkv, Lk, Dv]` after RoPE, key-value heads not repeated.
    `hidden [B, Lq, d_model]` is the attention module's input, `q_pre_rope [B, Lq, Hq, D]` are the queries before
    RoPE for methods whose `needs` name "q_pre_rope". `rows` are the batch rows served; `state` survives from prefill
    to decode and dies with the cache. `spans` are the places named by `Patch.spans`, per row `(start, stop)` in its
    real tokens. `dropped` keys are no longer in the cache (see `Method.retain`): what is left lies side by side, and
    positions are places in it. `held` is there for methods whose `needs` name "cache". From `output` on,
    `selection` is what the call ran with and `lse [B, Hq, Lq]` its log-sum-exp; it may be None after dense attention
    unless a method's `needs` name "lse". `forward` is there for methods whose `needs` name "forward".
    """

    layer: int
    num_layers: int
    phase: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    rows: tuple[int, ...] = ()
    hidden: Tensor | None = None
    q_pre_rope: Tensor | None = None
    module: nn.Module | None = None
    dropped: int = 0
    spans: Mapping[str, Sequence[Span]] | None = None
    selection: Selection | None = None
    lse: Tensor | None = None
    forward: Forward | None = None
    held: Held | None = None
    states: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        """What methods remember for these rows of this cache and layer; empty at first, and without a cache."""
        return self.states.setdefault(self.rows, {})

    @property
    def B(self) -> int:
        """Rows."""
        return self.q.shape[0]

    @property
    def Hq(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def Hkv(self) -> int:
        """Key-value heads."""
        return self.k.shape[1]

    @property
    def Lq(self) -> int:
        """Queries in this call."""
        return self.q.shape[2]

    @property
    def Lk(self) -> int:
        """Keys so far, this call's included."""
        return self.k.shape[2]

    @property
    def Hc(self) -> int:
        """Heads of the cache: Hkv, or 1 where it holds latent vectors (MLA)."""
        return self.Hkv if self.held is None else self.held.heads

    @property
    def cached(self) -> Tensor:
        """What the cache holds as keys `[B, Hc, Lk, D]`; latent vectors whole, with their rotated part."""
        return self.k if self.held is None or self.held.heads == self.Hkv else self.held.content()

    @property
    def places(self) -> Tensor | None:
        """Which of the tokens seen the keys are, `[B, Hc, Lk]`; None where that is all of them, or a rule's."""
        return None if self.held is None else self.held.places()

    @property
    def seen(self) -> int:
        """Tokens so far, those included whose keys were dropped."""
        return self.Lk + self.dropped

    @property
    def off(self) -> int:
        """Position of the first query."""
        return self.Lk - self.Lq

    @property
    def groups(self) -> int:
        """Query heads per key-value head (GQA)."""
        return self.Hq // self.Hkv

    @cached_property
    def layout(self) -> Layout:
        """The call's sizes, for selections."""
        return Layout(self.B, self.Hq, self.Hkv, self.Lq, self.Lk, self.q.device)

    @property
    def visible(self) -> int:
        """(row, head, query, key) pairs dense attention would look at, dropped keys included."""
        b, hq, lq, _ = self.q.shape
        return pairs(b, hq, lq, self.k.shape[2] + self.dropped)

    @cached_property
    def q_pos(self) -> Tensor:
        """Query positions `[Lq]`."""
        return torch.arange(self.off, self.Lk, device=self.q.device)

    @cached_property
    def k_pos(self) -> Tensor:
        """Key positions `[Lk]`."""
        return torch.arange(self.Lk, device=self.q.device)

    def asking(self, question_tokens: int) -> int:
        """The call's queries in a question of so many tokens, which ends it; none in a decode step."""
        return 0 if self.phase == "decode" else min(question_tokens, self.Lq)

    def first(self, count: int) -> "AttentionCall":
        """The same call for its first `count` queries and the keys up to the last of them."""
        stop = self.off + count
        return replace(
            self,
            q=self.q[:, :, :count],
            k=self.k[:, :, :stop],
            v=self.v[:, :, :stop],
            bias=None if self.bias is None else self.bias[..., :stop],
            held=None,
            hidden=None if self.hidden is None else self.hidden[:, :count],
            q_pre_rope=None if self.q_pre_rope is None else self.q_pre_rope[:, :count],
        )

    def step(self, n: int) -> "AttentionCall":
        """The decode step of query `n`: it and the keys up to its own."""
        stop = self.off + n + 1
        return replace(
            self,
            phase="decode",
            held=None,
            q=self.q[:, :, n : n + 1],
            k=self.k[:, :, :stop],
            v=self.v[:, :, :stop],
            hidden=None if self.hidden is None else self.hidden[:, n : n + 1],
            q_pre_rope=None if self.q_pre_rope is None else self.q_pre_rope[:, n : n + 1],
        )

    def take(self, rows: list[int]) -> "AttentionCall":
        """The same call for some of its rows (positions within this call)."""
        if rows == list(range(self.B)):
            return self
        pick = rows_on(self.q.device, tuple(rows))

        def some(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[pick]

        return replace(
            self,
            q=self.q[pick],
            k=self.k[pick],
            v=self.v[pick],
            bias=some(self.bias),
            held=None,
            hidden=some(self.hidden),
            q_pre_rope=some(self.q_pre_rope),
            rows=tuple(self.rows[r] for r in rows),
            spans=self.spans and {name: [places[r] for r in rows] for name, places in self.spans.items()},
        )
