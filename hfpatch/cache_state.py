"""What methods remember between prefill and decode: kept on the cache, so it dies, copies and reorders with it.

Transformers' cache layers are moved through `reorder_cache`, `crop`, `reset` and the batch operations; the
layer that carries state is given a subclass of its own class that moves the state along.
Tensors in a state have rows first and are indexed; objects may define `reorder(index)` and `crop(length)`.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Rows = tuple[int, ...]


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


def _move(layer: Any, source: list[int]) -> None:
    layer.hfpatch_states = {name: _moved(states, source) for name, states in layer.hfpatch_states.items()}


def _reorder(layer: Any, beam_idx: Tensor) -> None:
    _move(layer, beam_idx.tolist())


def _select(layer: Any, indices: Tensor) -> None:
    _move(layer, indices.nonzero()[:, 0].tolist() if indices.dtype == torch.bool else indices.tolist())


def _repeat(layer: Any, repeats: int) -> None:
    rows = {row for states in layer.hfpatch_states.values() for key in states for row in key}
    _move(layer, [row for row in range(max(rows, default=-1) + 1) for _ in range(repeats)])


def _crop(layer: Any, *args: Any, **kwargs: Any) -> None:
    length = int(layer.get_seq_length())
    for states in layer.hfpatch_states.values():
        for state in states.values():
            for value in state.values():
                if hasattr(value, "crop"):
                    value.crop(length)


def _reset(layer: Any) -> None:
    layer.hfpatch_states = {}


_FOLLOW: dict[str, Callable[..., None]] = {
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": _reset,
}


def _then(original: Callable[..., None], follow: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        follow(self, *args, **kwargs)

    return method


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
    body["__reduce_ex__"] = lambda self, protocol: (_restore, (cls,), self.__dict__)
    return type(cls)(f"Hfpatch{cls.__name__}", (cls,), {**body, "__module__": __name__, "_layer_type": None})


def cache_layer(cache: Any, layer_idx: int | None) -> Any | None:
    """The cache's layer of that index, if it has one."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    return None if layers is None or layer_idx is None or layer_idx >= len(layers) else layers[layer_idx]


def cache_states(cache: Any, layer_idx: int | None, name: str) -> dict[Rows, State]:
    """States of the attention module `name` kept with `cache`, by batch rows; a fresh dict without a cache."""
    layer = cache_layer(cache, layer_idx)
    if layer is None:
        return {}
    if not hasattr(layer, "hfpatch_states"):
        layer.hfpatch_states = {}
        cls: Any = type(layer)
        layer.__class__ = following(cls)
    return layer.hfpatch_states.setdefault(name, {})
