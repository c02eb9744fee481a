"""From a raw call to the calls that methods see: rows that share their padding, steps, routes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.call import AttentionCall, Held, Span
from ..core.method import Method
from ..errors import InputError
from .cache_state import cache_layer
from .kept import Kept
from .raw_call import RawCall
from .row_slice import RowSlice


@dataclass(eq=False)
class Place:
    """Where a patched layer stands, what its methods need to see, and the spans they were told of."""

    layer: int
    num_layers: int
    needs: frozenset[str]
    spans: Mapping[str, Sequence[Span]]

    def call(self, raw: RawCall, phase: str, tokens: RowSlice, kept: Kept | None) -> AttentionCall:
        """The call of the rows whose real tokens are `tokens`; `kept` is what a cropped cache has left of them."""
        queries = tokens.after(raw.total - raw.q.shape[2])
        keys = kept.slots_of(tokens, raw.total, raw.k.shape[2]) if kept else tokens
        hidden = raw.context.hidden
        pre_rope = raw.q_pre_rope if "q_pre_rope" in self.needs else None
        if (len(tokens.rows), queries.length) != (raw.q.shape[0], raw.q.shape[2]):
            hidden, pre_rope = (None if x is None else queries.take(x, 1) for x in (hidden, pre_rope))
        return AttentionCall(
            layer=self.layer, num_layers=self.num_layers, phase=phase,
            q=queries.take(raw.q), k=keys.take(raw.k), v=keys.take(raw.v),
            scale=raw.scale, softcap=raw.softcap, sinks=raw.sinks, rows=tokens.rows,
            dropped=tokens.length - keys.length, hidden=hidden, q_pre_rope=pre_rope,
            module=raw.module, spans=self.spans and self._spans_of(tokens.rows, raw.q.shape[0]),
            forward=raw.context.forward,
            held=_held(raw, keys, tokens, kept) if "cache" in self.needs and raw.cache is not None else None,
        )  # fmt: skip

    def _spans_of(self, rows: Sequence[int], batch: int) -> dict[str, list[Span]]:
        """The spans of these rows; each row's beams, which stand next to each other, share its span."""
        if any(batch % len(places) for places in self.spans.values()):
            counts = ", ".join(str(len(places)) for places in self.spans.values())
            raise InputError(f"Spans are given for {counts} rows, the batch has {batch}.")
        return {name: [places[r * len(places) // batch] for r in rows] for name, places in self.spans.items()}


def _held(raw: RawCall, keys: RowSlice, tokens: RowSlice, kept: Kept | None) -> Held | None:
    """What the cache holds of these rows, worked out when asked for."""
    layer: Any = cache_layer(raw.cache, raw.slot)
    stored = getattr(layer, "keys", None)
    if not isinstance(stored, Tensor) or stored.ndim != 4:
        return None

    def own() -> Tensor:
        return keys.take(torch.cat([layer.keys, layer.values], -1))

    def places() -> Tensor | None:
        starts = [tokens.start if row in tokens.rows else None for row in range(raw.q.shape[0])]
        found = None if kept is None else kept.all_places(starts, raw.k.shape[2])
        return None if found is None else keys.take(found)

    return Held(stored.shape[1], own, places, tokens.start)


def steps(call: AttentionCall, several: bool) -> Iterator[tuple[int, AttentionCall]]:
    """The call, or its queries one by one where `several` count as decode steps; each with its first query."""
    if not several:
        yield 0, call
    elif call.off == 0:  # rows whose padding ends here
        yield 0, replace(call, phase="prefill")
    else:
        for n in range(call.Lq):
            yield n, call.step(n)


def routed(call: AttentionCall, router: Method) -> Iterator[tuple[AttentionCall, Method | None]]:
    """The rows of a call by the method that the router sends them to."""
    by_choice: dict[Method | None, list[int]] = {}
    for row, child in enumerate(router.route(call)):
        by_choice.setdefault(child, []).append(row)
    for child, rows in by_choice.items():
        yield call.take(rows), child
