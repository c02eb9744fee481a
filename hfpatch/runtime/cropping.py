"""Caches that drop keys: before a call, when it begins, and after it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.call import AttentionCall, rows_on
from ..core.method import Method
from ..core.places import Places
from ..core.selection import SinkWindow
from ..errors import CacheError, IncompatibleMethodsError
from .cache_keep import become_kept, check_croppable, cut, open_layer
from .cache_state import cache_layer, forget_keys
from .kept import Kept, counted
from .raw_call import RawCall
from .row_slice import RowSlice

Calls = Sequence[tuple[AttentionCall, RowSlice]]


class Cropping:
    """What the one method of a layer that may `retain` only some keys does to its cache."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.method = next((m for m in methods if m.retain is not None), None)
        self.retain = None if self.method is None else self.method.retain
        self.held: tuple[int, int] | None = None  # keys per head in the last cache, and tokens it had seen

    def before(self, cache: Any, layer_idx: int | None) -> None:
        """Announce a call to a layer that has dropped keys, which serves no others."""
        if self.method is not None:
            open_layer(cache, layer_idx, self.method.name)

    def dense(self, raw: RawCall, reason: str) -> None:
        """See a call run dense for a `reason`. Raises CacheError where that would take what is left for the whole."""
        if raw.kept:
            raise CacheError(f"{reason} asks for dense attention, but this cache was cropped; start it anew.")
        if self.retain and raw.cache is None and raw.k.shape[2] > raw.q.shape[2]:
            raise CacheError(
                "The attention module was given keys of earlier calls but no cache that could drop some; use a method "
                "that keeps them all."
            )
        if self.retain and raw.cache is not None and raw.total > 0:
            self.held = raw.total, raw.total

    def check(self, kept: Kept, call: AttentionCall) -> None:
        """Raise CacheError when these rows want keys that a rule has dropped."""
        if kept.rule and (self.retain is None or self.retain(call) != kept.rule):
            raise CacheError(
                "This cache has been cropped for another route or another window; keep both, or process the prompt "
                "anew."
            )

    def after(self, raw: RawCall, calls: Calls, groups: Sequence[RowSlice]) -> None:
        """Let the cache drop what the method does not keep. Raises CacheError where it cannot."""
        if self.retain is None or raw.cache is None:
            return
        if not (raw.kept and raw.kept.rule):
            check_croppable(raw.cache, raw.slot, getattr(raw.module, "layer_idx", None))
            self._drop(raw, calls, groups)
        self.held = cache_layer(raw.cache, raw.slot).keys.shape[2], raw.total  # type: ignore[union-attr]

    def _drop(self, raw: RawCall, calls: Calls, groups: Sequence[RowSlice]) -> None:
        assert self.retain is not None and self.method is not None
        asked = {row for _, tokens in calls for row in tokens.rows}
        others = [g for g in groups if g.length and not set(g.rows) <= asked]
        if others or not calls or any(tokens.stop < raw.total for _, tokens in calls):
            return  # rows that have ended keep their keys
        answers = [self.retain(call) for call, _ in calls]
        found = [a for a in answers if a is not None]
        if not found:
            return
        if all(isinstance(a, Places) for a in found):
            _keep_places(raw, calls, self.method.name, answers)
        elif isinstance(found[0], SinkWindow) and all(a == found[0] for a in answers):
            _keep_window(raw, calls, self.method.name, found[0])


def kept_notes(layers: Iterable[tuple[int, Cropping]]) -> list[str]:
    """What the report says of methods that drop keys: the share that the last cache held, by layer."""
    shares: dict[str, dict[int, float]] = {}
    tokens: dict[str, int] = {}
    for layer, cropping in layers:
        if cropping.method is not None and cropping.held is not None:
            name, (held, seen) = cropping.method.name, cropping.held
            shares.setdefault(name, {})[layer] = held / seen
            tokens[name] = seen
    notes = []
    for name, by_layer in shares.items():
        found = set(by_layer.values())
        if found == {1.0}:
            notes.append(f"{name} has dropped NOTHING: the last cache holds the keys of all {tokens[name]} tokens")
            continue
        each = ", ".join(f"{n}: {share:.1%}" for n, share in by_layer.items()) if len(found) > 1 else ""
        mean = sum(by_layer.values()) / len(by_layer)
        notes.append(
            f"{name}: the last cache holds {mean:.1%} of {tokens[name]} tokens' keys" + (each and f" ({each})")
        )
    return notes


def _starts(raw: RawCall, calls: Calls) -> list[int | None]:
    """Where the rows of the batch begin; None for those that have not."""
    starts: list[int | None] = [None] * raw.q.shape[0]
    for _, tokens in calls:
        for row in tokens.rows:
            starts[row] = tokens.start
    return starts


def _keep_window(raw: RawCall, calls: Calls, method: str, rule: SinkWindow) -> None:
    """Leave sink and window, once no row is shorter or has not begun."""
    starts, slots = _starts(raw, calls), rule.sink + rule.window - 1
    if raw.total != raw.k.shape[2] or None in starts or any(call.Lk <= slots for call, _ in calls):
        return
    first = torch.tensor(starts, device=raw.k.device)
    kept = Kept(method, rule, raw.total, slots, starts, [0] * len(starts))
    become_kept(cache_layer(raw.cache, raw.slot), kept, lambda x: cut(x, rule, first), 0)


def _keep_places(raw: RawCall, calls: Calls, method: str, answers: Sequence[Any]) -> None:
    """Leave the sets that a method gave, at the right of as many slots as the largest takes."""
    layer: Any = cache_layer(raw.cache, raw.slot)
    (batch, heads, keys), before = layer.keys.shape[:3], raw.kept
    both = [(answer, call, tokens) for answer, (call, tokens) in zip(answers, calls, strict=True)]
    sizes = [call.Lk if answer is None else _checked(answer, call, heads, method) for answer, call, _ in both]
    if all(n == call.Lk for n, (_, call, _) in zip(sizes, both, strict=True)):
        return
    slots, empty, starts = max(sizes), [max(sizes)] * batch, _starts(raw, calls)
    index = torch.full((batch, heads, slots), -1, device=layer.keys.device)
    for n, (answer, _, tokens) in zip(sizes, both, strict=True):
        at = before.slots_of(tokens, raw.total, keys) if before else tokens
        own = torch.arange(n, device=index.device)[None, None] if answer is None else answer.index.to(index.device)
        index[rows_on(index.device, tokens.rows), :, slots - n :] = own.long() + at.start
        for row in tokens.rows:
            empty[row] = slots - n
    places = None if before is None else before.all_places(starts, keys)
    if places is None:
        places = counted(starts, 0, keys, index).expand(-1, heads, -1)
    taken = index.clamp(min=0)
    places = places.gather(2, taken).masked_fill_(index < 0, -1)
    known = [a for a in answers if a is not None]
    free = raw.total if before is None else raw.total - before.seen + before.tail
    tail = min(free if len(known) < len(answers) else slots, *(a.recent for a in known), slots)
    kept = Kept(method, None, raw.total, slots, starts, empty, places, tail)

    def pick(x: Tensor) -> Tensor:
        return x.gather(2, taken[..., None].expand(-1, -1, -1, x.shape[-1]))

    become_kept(layer, kept, pick, max(a.room for a in known))
    forget_keys(layer, {row for answer, _, tokens in both if answer is not None for row in tokens.rows})


def _checked(answer: Places, call: AttentionCall, heads: int, method: str) -> int:
    """Keys that an answer keeps. Raises IncompatibleMethodsError where it is not one for this call."""
    index = answer.index
    if index.ndim != 3 or index.shape[0] != call.B or index.shape[1] not in (1, heads) or index.is_floating_point():
        raise IncompatibleMethodsError(
            f"{method!r} keeps places of shape {list(index.shape)}, and the cache of layer {call.layer} has {heads} "
            f"heads for {call.B} rows; give whole numbers [rows, heads or 1, keys]."
        )
    return index.shape[2]
