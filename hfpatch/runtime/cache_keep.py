"""Cache layers that hold fewer keys than they have seen: a sink and a window, or a set of their own for every head.

Positions go on counting every token seen, so the model's masks and rotations stay those of the whole cache. New keys
come last and kept ones stay in order: what is causal by slot is causal by position.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..core.selection import SinkWindow
from ..errors import CacheError
from .cache_state import cache_layer, following, mark_keys
from .kept import Kept

ASK = "leave fullgraph=True out, or patch with a method of docs/compiled-decoding.md"
_OPEN = "hfpatch_open"
_VIEWS = ("keys", "values", "hfpatch_mark", _OPEN)
_Followed: Any = following(DynamicLayer)


class _Keeping(DynamicLayer):
    """A DynamicLayer that holds what `hfpatch_kept` says, in a store with room; it serves only announced calls."""

    keys: Tensor
    values: Tensor
    hfpatch_kept: Kept
    hfpatch_seen: int
    hfpatch_room: int
    hfpatch_store: tuple[Tensor, Tensor]

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be taken back: those since the last drop, and those that it protected."""
        return self.hfpatch_kept.rule is None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Kept and new keys and values `[B, Hc, kept + new, D]`; never in a graph of torch.compile."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg="hfpatch: this cache has dropped keys, and a graph needs all of them; " + ASK
            )
        if not self.__dict__.pop(_OPEN, False):
            raise CacheError(
                "This cache has been cropped to the keys of another patch; patch the model with the same method "
                "again, or process the prompt anew."
            )
        if self.__dict__.pop("hfpatch_lost", False):
            raise CacheError("The keys of a cropped cache have been changed by hand; process the prompt anew.")
        new = key_states, value_states
        self.hfpatch_seen += key_states.shape[-2]
        if (rule := self.hfpatch_kept.rule) is not None:
            keys, values = _joined(self.keys, self.values, *new)
            self._show((cut(keys, rule), cut(values, rule)))
            return keys, values
        self._append(new)
        return self.keys, self.values

    def _append(self, new: tuple[Tensor, Tensor]) -> None:
        held, count = self.keys.shape[-2], new[0].shape[-2]
        store = self.hfpatch_store
        if any(x.requires_grad for x in (*new, *store)):
            self._show(_joined(self.keys, self.values, *new))
            return
        locked = store[0].is_inference() and not torch.is_inference_mode_enabled()
        if locked or held + count > store[0].shape[-2]:
            store = with_room((self.keys, self.values), max(count, self.hfpatch_room))
        for whole, part in zip(store, new, strict=True):
            whole[..., held : held + count, :] = part
        self._show(store, held + count)

    def _show(self, store: tuple[Tensor, Tensor], count: int | None = None) -> None:
        """Hold `store`, of which the first `count` slots are filled; all of them without."""
        self.hfpatch_store = store
        self.keys, self.values = store if count is None else (x[..., :count, :] for x in store)

    def _filled(self) -> int:
        """Slots in use, kept and appended since."""
        kept = self.hfpatch_kept
        return self.hfpatch_store[0].shape[-2] if kept.rule else kept.slots + self.hfpatch_seen - kept.seen

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return int(self.hfpatch_seen)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys for the model's mask: the whole cache's. Old releases give positions."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return int(self.hfpatch_seen) + new, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens. Raises CacheError where keys before them are gone."""
        seen, kept = self.hfpatch_seen, self.hfpatch_kept
        back = -tokens_to_remove if tokens_to_remove <= 0 else seen - tokens_to_remove  # old releases name the length
        if back <= 0:
            return
        if kept.rule:
            raise CacheError(
                "This cache keeps a sink and a window alone, which cannot be rolled back: earlier keys are gone; "
                "use crop_cache=False."
            )
        if seen - back < kept.seen - kept.tail:
            raise CacheError(
                f"This cache has dropped keys and cannot be rolled back by {back} tokens; a longer `window` leaves "
                "room for that."
            )
        self.hfpatch_kept, self.hfpatch_seen = kept.shortened(seen - back), seen - back
        self._show(self.hfpatch_store, self._filled())

    def _take(self, source: Tensor) -> None:
        held = self._filled()
        self.hfpatch_kept = self.hfpatch_kept.taken(source.tolist())
        keys, values = (x.index_select(0, source.to(x.device)) for x in self.hfpatch_store)
        self._show((keys, values), held)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` of these."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows `indices` of these, numbers or bool."""
        self._take(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._take(torch.arange(self.hfpatch_store[0].shape[0]).repeat_interleave(repeats))

    def reset(self) -> None:
        """Back to an empty layer that keeps everything."""
        super().reset()
        for name in ("hfpatch_kept", "hfpatch_seen", "hfpatch_room", "hfpatch_store", _OPEN):
            self.__dict__.pop(name, None)
        self.__class__ = _Followed


_FollowedKeeping: Any = following(_Keeping)


class KeptLayer(_FollowedKeeping):
    """A cache layer that has dropped keys. Copies share no room: its views are made anew."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._show(self.hfpatch_store, self._filled())
        mark_keys(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (), {name: value for name, value in self.__dict__.items() if name not in _VIEWS}


def _empty() -> KeptLayer:
    return KeptLayer.__new__(KeptLayer)


def _joined(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([keys, new_keys], -2), torch.cat([values, new_values], -2)


def with_room(pair: tuple[Tensor, Tensor], room: int) -> tuple[Tensor, Tensor]:
    """Copies of keys and values `[B, Hc, n, D]` with `room` more slots each."""
    keys, values = (x.new_empty(*x.shape[:2], x.shape[2] + room, x.shape[3]) for x in pair)
    for whole, x in zip((keys, values), pair, strict=True):
        whole[..., : x.shape[2], :] = x
    return keys, values


def cut(x: Tensor, keep: SinkWindow, starts: Tensor | None = None) -> Tensor:
    """First `sink` tokens from `starts [B]` on (from 0 without) and the last `window - 1` of `x [B, H, L, D]`."""
    length, recent = x.shape[-2], keep.window - 1
    if starts is None:
        if length <= keep.sink + recent:
            return x
        return torch.cat([x[..., : keep.sink, :], x[..., length - recent :, :]], dim=-2)
    sink = starts[:, None] + torch.arange(keep.sink, device=x.device)
    rows = torch.cat([sink, torch.arange(length - recent, length, device=x.device).expand(len(sink), -1)], dim=1)
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def check_croppable(cache: Any, slot: int | None, layer_idx: int | None) -> None:
    """Raise CacheError when the keys of layer `slot`, used by the module of `layer_idx`, cannot be dropped."""
    layer = cache_layer(cache, slot)
    if slot != layer_idx:
        raise CacheError(
            "Dropping keys needs modules that use one layer of the cache each; use a method that keeps them all."
        )
    ours = type(layer) in (DynamicLayer, _Followed, KeptLayer)
    offloaded = getattr(cache, "offloading", False)
    if not ours or offloaded or hasattr(cache, "self_attention_cache"):
        name = type(cache).__name__
        name = f"an offloaded {name}" if offloaded else f"{name} of {type(layer).__name__}"
        raise CacheError(
            f"Dropping keys works with a plain DynamicCache on the model's device, not with {name}; use that, or a "
            "method that keeps them all."
        )


def open_layer(cache: Any, slot: int | None, method: str) -> None:
    """Announce a call by a patch with the method that dropped a layer's keys."""
    layer = cache_layer(cache, slot)
    if isinstance(layer, KeptLayer) and layer.hfpatch_kept.method == method:
        layer.__dict__[_OPEN] = True


def kept_by(cache: Any, slot: int | None) -> Kept | None:
    """What a layer that has dropped keys has left; None for others."""
    layer = cache_layer(cache, slot)
    return layer.hfpatch_kept if isinstance(layer, KeptLayer) else None


def become_kept(layer: Any, kept: Kept, pick: Callable[[Tensor], Tensor], room: int) -> None:
    """Leave what `pick` takes of keys and values `[B, Hc, L, D]` in a layer, and `room` for so many more."""
    seen = layer.get_seq_length()
    picked = pick(layer.keys), pick(layer.values)
    layer.__dict__.setdefault("hfpatch_states", {})
    layer.hfpatch_kept, layer.hfpatch_seen, layer.hfpatch_room = kept, seen, room
    layer.__class__ = KeptLayer
    layer._show(with_room(picked, room) if room else picked, picked[0].shape[-2])
    mark_keys(layer)
