"""What methods remember between prefill and decode: kept on the cache, so it dies, copies and reorders with it.

Transformers' cache layers are moved through `reorder_cache`, `crop`, `reset` and the batch operations; the
layer that carries state is given a subclass of its own class that moves the state along.
Tensors in a state have rows first and are indexed; objects may define `reorder(index)` and `crop(length)`.
"""

from functools import cache
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


def _moved(states: dict[Rows, State], source: list[int]) -> dict[Rows, State]:
    """States after the batch became `[old[source[0]], old[source[1]], ...]`; rows keep together as they were."""
    origin = {row: rows for rows in states for row in rows}
    members: dict[Rows, list[int]] = {}
    for new, old in enumerate(source):
        if old in origin:
            members.setdefault(origin[old], []).append(new)
    out: dict[Rows, State] = {}
    for rows, new_rows in members.items():
        index = torch.tensor([rows.index(source[n]) for n in new_rows])
        out[tuple(new_rows)] = {key: _take(value, index) for key, value in states[rows].items()}
    return out


class _Following:
    """Mixin of a cache layer that takes method states along."""

    __slots__ = ()
    hfpatch_states: dict[str, dict[Rows, State]]

    def _move(self, source: list[int]) -> None:
        self.hfpatch_states = {name: _moved(states, source) for name, states in self.hfpatch_states.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._move(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = {row for states in self.hfpatch_states.values() for key in states for row in key}
        self._move([row for row in range(max(rows, default=-1) + 1) for _ in range(repeats)])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        for states in self.hfpatch_states.values():
            for state in states.values():
                for value in state.values():
                    if hasattr(value, "crop"):
                        value.crop(length)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.hfpatch_states = {}


@cache
def _following(cls: type) -> type:
    name = f"Hfpatch{cls.__name__}"
    made = type(name, (_Following, cls), {"__module__": __name__, "__qualname__": name})
    globals()[name] = made
    return made


def cache_states(cache: Any, layer_idx: int | None, name: str) -> dict[Rows, State]:
    """States of the attention module `name` kept with `cache`, by batch rows; a fresh dict without a cache."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None or layer_idx is None or layer_idx >= len(layers):
        return {}
    layer = layers[layer_idx]
    if not isinstance(layer, _Following):
        layer.hfpatch_states = {}
        layer.__class__ = _following(type(layer))
    return layer.hfpatch_states.setdefault(name, {})
