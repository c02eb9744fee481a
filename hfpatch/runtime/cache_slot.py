"""Which layer of a cache an attention call uses, and how many tokens that layer has seen."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .last_answer import LastAnswer

_last: "LastAnswer[int | None]" = LastAnswer()


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache of keys: releases change the keyword's name, not what it is."""
    cls = type(value)
    return issubclass(cls, Cache) or (hasattr(cls, "update") and (hasattr(cls, "get_seq_length") or is_paged(value)))


def is_paged(cache: Any) -> bool:
    """Whether it is a cache of continuous batching, which keeps the keys of several sequences in pages."""
    return any("Paged" in cls.__name__ for cls in type(cache).__mro__)


def layers_of(cache: Any) -> list[Any]:
    """The cache's layers of self-attention."""
    return getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or []


def find_slot(cache: Any, layer_idx: int | None, key: Tensor) -> int | None:
    """Index of the cache layer a call has used: the one that holds `key [B, Hkv, Lk, D]`, else the module's own.

    A module may serve several layers of the cache, or none that its `layer_idx` names. Layers that hold something
    else than the keys they hand out, such as latent vectors or quantised keys, are not found by them.
    """
    layers = layers_of(cache)
    own = layer_idx if layer_idx is not None and 0 <= layer_idx < len(layers) else None
    if own is not None and getattr(layers[own], "keys", None) is key:
        return own
    return next((n for n, layer in enumerate(layers) if getattr(layer, "keys", None) is key), own)


def tokens_seen(
    cache: Any,
    slot: int | None,
    layer_idx: int | None,
    key: Tensor,
    positions: Any = None,
    asker: int | None = None,
    read: Callable[[Tensor], int] = int,
) -> int | None:
    """Tokens a cache has seen: asked of the layer in use, else of an earlier one; None where none of them tells.

    Static layers count on the device. One of those that share the tensor `positions`, as all layers of a forward pass
    do, is read by `read`, once for each `asker`.
    """
    layers = layers_of(cache)
    if slot is None:
        return None if layers or layer_idx is None else _length_at(cache, layer_idx)
    if layers[slot].__class__ is DynamicLayer and layers[slot].keys is key:
        return int(key.shape[2])  # as its get_seq_length has it
    if isinstance(positions, Tensor) and has_room(cache, slot, key.shape[2]):
        of = (id(cache), key.shape[2])
        return _last.of(positions, of, asker, lambda: _length_from(cache, slot, read), once=True)
    return _length_from(cache, slot)


def _length_from(cache: Any, slot: int, read: Callable[[Tensor], int] = int) -> int | None:
    found = (_length_at(cache, index, read) for index in range(slot, -1, -1))
    return next((n for n in found if n is not None), None)


def _length_at(cache: Any, index: int, read: Callable[[Tensor], int] = int) -> int | None:
    """Tokens that layer `index` of a cache has seen; None for layers without a length, such as linear attention's."""
    try:
        length = cache.get_seq_length(index)
        return read(length) if isinstance(length, Tensor) else int(length)
    except (AttributeError, IndexError, NotImplementedError, ValueError):
        return None


def has_room(cache: Any, slot: int | None, keys: int) -> bool:
    """Whether `keys` is the capacity of a static layer, whose last keys are not written yet."""
    layers = layers_of(cache)
    return slot is not None and getattr(layers[slot], "max_cache_len", None) == keys
