"""Feeding a model piece by piece, with a cache or without, alone or padded, patched or not."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from .oracle import Listener

CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class Session:
    """One conversation with a model; a listener is told how many tokens have been fed."""

    def __init__(
        self,
        model: PreTrainedModel,
        listener: Listener | None = None,
        mask: Tensor | None = None,
        positions: bool = False,
        capacity: int = 0,
    ) -> None:
        self.model, self.listener, self.mask, self.positions = model, listener, mask, positions
        self.total, self.capacity, self.cache = 0, capacity, None
        if capacity:
            self.cache = StaticCache(config=model.config, max_cache_len=capacity)

    @torch.no_grad()
    def feed(self, ids: Tensor, cached: bool = True) -> Tensor:
        """Logits `[B, L, V]` of the next tokens `[B, L]`."""
        before, self.total = self.total, self.total + ids.shape[1]
        self._tell()
        kwargs: dict[str, Any] = {"use_cache": cached}
        if self.mask is not None:
            kwargs["attention_mask"] = self.mask[:, : self.total]
            if self.positions:
                kwargs["position_ids"] = zoo.positions(self.mask)[:, before : self.total]
        if self.cache is not None:
            kwargs[cache_name(self.model)] = self.cache
        out = self.model(input_ids=ids, **kwargs)
        if cached and self.cache is None:
            self.cache = next((x for x in out.values() if hasattr(x, "get_seq_length")), None)
            if self.cache is None:
                raise TypeError(f"{type(self.model).__name__} returns no cache")
        return out.logits

    def _tell(self) -> None:
        if self.listener is not None:
            self.listener.total, self.listener.capacity = self.total, self.capacity
            self.listener.starts = (torch.zeros(1) if self.mask is None else self.mask.argmax(-1)).long()


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache. Raises TypeError when it takes none."""
    known = inspect.signature(model.forward).parameters
    name = next((n for n in CACHE_NAMES if n in known), None)
    if name is None:
        raise TypeError(f"{type(model).__name__} takes no cache")
    return name


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward names position_ids."""
    return "position_ids" in inspect.signature(model.forward).parameters
