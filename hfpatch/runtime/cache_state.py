"""What methods remember between prefill and decode: kept on the cache, so it dies, copies and reorders with it.

Transformers' cache layers are moved through `reorder_cache`, `crop`, `reset` and the batch operations; the
layer that carries state is given a subclass of its own class that moves the state along. Keys changed in any other
way (sliced, permuted or overwritten by hand) are noticed at the next `update`, and all that was remembered is dropped.
Tensors in a state have rows first and are indexed; objects may define `reorder(index)` and `crop(length)`. What has
been worked out from keys must define `crop`: it is dropped when the row no longer begins with those keys.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from .cache_slot import layers_of
from .graph_tensors import count_update, drop_graph_states, move_graph_states

State = dict[str, Any]
Rows = tuple[int, ...]
FITS = "hfpatch-fits"


def _take(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device))
    if hasattr(value, "reorder"):
        return value.reorder(index)
    if isinstance(value, list):
        return [value[i] for i in index.tolist()]
    return value


def _put(states: dict[Rows, State], rows: Rows, state: State, index: list[int]) -> None:
    taken = {key: _take(value, torch.tensor(index)) for key, value in state.items()}
    states.setdefault(rows, {}).update(taken)


def _moved(states: dict[Rows, State], source: list[int]) -> dict[Rows, State]:
    """States after the batch became `[old[source[0]], old[source[1]], ...]`; rows keep together as they were."""
    out: dict[Rows, State] = {}
    for rows, state in states.items():
        new = [n for n, old in enumerate(source) if old in rows]
        if new:
            _put(out, tuple(new), state, [rows.index(source[n]) for n in new])
    return out


def split_states(states: dict[Rows, State], rows: Rows) -> None:
    """Part states of `rows` from those of others they were kept with, as when a shared prompt branches."""
    for whole in list(states):
        inside = tuple(r for r in whole if r in rows)
        if inside and inside != whole:
            state = states.pop(whole)
            for part in (inside, tuple(r for r in whole if r not in rows)):
                _put(states, part, state, [whole.index(r) for r in part])


def fit_states(states: dict[Rows, State], rows: Rows, start: int, first: int) -> bool:
    """States for `rows` by themselves, whose tokens now begin at `start` and whose new ones at `first`.

    What was worked out from keys is kept if the tokens began there before and none of those known is to come anew;
    tells whether something was dropped.
    """
    split_states(states, rows)
    dropped = False
    for own, state in states.items():
        known = state.get(FITS)
        if known is None or not set(own) <= set(rows) or (known[0] == start and known[1] <= first):
            continue
        for name in [n for n, value in state.items() if hasattr(value, "crop")]:
            del state[name]
            dropped = True
    return dropped


def note_fitting(states: dict[Rows, State], rows: Rows, start: int, stop: int) -> None:
    """Record that the states of `rows` speak of the tokens `start .. stop` of the cache."""
    for own, state in states.items():
        if state and set(own) <= set(rows):
            state[FITS] = (start, stop)


def forget_keys(layer: Any, rows: set[int]) -> None:
    """Drop what was worked out from the keys of some rows of a layer, which lie in other places now."""
    for states in layer.hfpatch_states.values():
        for state in (state for own, state in states.items() if rows & set(own)):
            for name in [n for n, value in state.items() if hasattr(value, "crop")]:
                del state[name]


def _move(layer: Any, source: list[int]) -> None:
    layer.hfpatch_states = {name: _moved(states, source) for name, states in layer.hfpatch_states.items()}
    move_graph_states(layer, source)


def _reorder(layer: Any, beam_idx: Tensor) -> None:
    _move(layer, beam_idx.tolist())


def _select(layer: Any, indices: Tensor) -> None:
    _move(layer, indices.nonzero()[:, 0].tolist() if indices.dtype == torch.bool else indices.tolist())


def _repeat(layer: Any, repeats: int) -> None:
    rows = {row for states in layer.hfpatch_states.values() for key in states for row in key}
    _move(layer, [row for row in range(max(rows, default=-1) + 1) for _ in range(repeats)])


def _crop(layer: Any, *args: Any, **kwargs: Any) -> None:
    drop_graph_states(layer)
    length, kept = int(layer.get_seq_length()), getattr(layer, "hfpatch_kept", None)
    for states in layer.hfpatch_states.values():
        for rows, state in states.items():
            start, stop = state.get(FITS, (0, length))
            left = length - start - (kept.dropped(rows[0]) if kept else 0)
            for value in state.values():
                if hasattr(value, "crop"):
                    value.crop(max(left, 0))
            if FITS in state:
                state[FITS] = (start, min(stop, length))


def _reset(layer: Any, *args: Any, **kwargs: Any) -> None:
    layer.hfpatch_states = {}
    drop_graph_states(layer)


def _stay(layer: Any, *args: Any, **kwargs: Any) -> None:
    """Keys that only move to another device."""


_FOLLOW: dict[str, Callable[..., None]] = {
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": _reset,
    "offload": _stay,
    "prefetch": _stay,
}


def _then(original: Callable[..., None], follow: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        check_keys(self)
        original(self, *args, **kwargs)
        follow(self, *args, **kwargs)
        mark_keys(self)

    return method


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self.hfpatch_mark = None  # keys that come in a graph are ours, and their version is unknown
            return original(self, *args, **kwargs)
        check_keys(self)
        count_update(self)
        out = original(self, *args, **kwargs)
        mark_keys(self)
        return out

    return update


def mark_keys(layer: Any) -> None:
    """Remember which keys the states have been made from."""
    keys = getattr(layer, "keys", None)
    layer.hfpatch_mark = (keys, _version(keys))


def check_keys(layer: Any) -> None:
    """Drop the states if the keys have been changed since, and let go of the keys that were remembered."""
    mark = layer.__dict__.pop("hfpatch_mark", None)
    keys = getattr(layer, "keys", None)
    changed = mark is not None and (mark[0] is not keys or mark[1] != _version(keys))
    if changed:
        drop_graph_states(layer)
    if changed and (any(layer.hfpatch_states.values()) or hasattr(layer, "hfpatch_kept")):
        layer.hfpatch_states, layer.hfpatch_lost = {}, True


def _version(keys: Any) -> int | None:
    known = isinstance(keys, Tensor) and not torch.compiler.is_compiling() and not keys.is_inference()
    return keys._version if known else None


def _set_state(layer: Any, state: dict[str, Any]) -> None:
    layer.__dict__.update(state)
    if "hfpatch_mark" in state:  # a copied tensor counts its changes anew
        mark_keys(layer)


def _restore(cls: type) -> Any:
    made: Any = following(cls)
    return made.__new__(made)


@cache
def following(cls: type) -> type:
    """Subclass of a cache layer's class that takes method states along.

    A single base keeps the instance layout, so a layer can change into it; `_layer_type` is cleared because
    Transformers registers every subclass that has one.
    """
    body: dict[str, Any] = {n: _then(getattr(cls, n), f) for n, f in _FOLLOW.items() if hasattr(cls, n)}
    if hasattr(cls, "update"):
        body["update"] = _watched(cls.update)
    body["__setstate__"] = _set_state
    body["__reduce_ex__"] = lambda self, protocol: (_restore, (cls,), self.__dict__)
    return type(cls)(f"Hfpatch{cls.__name__}", (cls,), {**body, "__module__": __name__, "_layer_type": None})


def cache_layer(cache: Any, slot: int | None) -> Any | None:
    """The cache's layer of that index, if it has one."""
    layers = layers_of(cache)
    return layers[slot] if slot is not None and 0 <= slot < len(layers) else None


def cache_states(cache: Any, slot: int | None, name: str) -> dict[Rows, State]:
    """States called `name` kept with a layer of the cache, by batch rows; a fresh dict without a cache."""
    layer = cache_layer(cache, slot)
    return {} if layer is None else followed(layer).hfpatch_states.setdefault(name, {})


def followed(layer: Any) -> Any:
    """The layer of a cache, made to take states along."""
    if not hasattr(layer, "hfpatch_states"):
        layer.hfpatch_states = {}
        cls: Any = type(layer)
        layer.__class__ = following(cls)
        mark_keys(layer)
    return layer


def was_lost(cache: Any, slot: int | None) -> bool:
    """Whether states have been dropped since last asked, because somebody else changed the layer's keys."""
    layer = cache_layer(cache, slot)
    return layer is not None and layer.__dict__.pop("hfpatch_lost", False)
