"""What patched attention should give: explicit masks around the unpatched model's own attention functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .patterns import Method

Attend = Callable[..., Any]


class UnjudgedError(Exception):
    """A call whose keys are not the tokens so far, so that no position can be given to them."""


@contextmanager
def interface(wrap: Callable[[Attend], Attend]) -> Iterator[None]:
    """Wrap every attention function that modules look up."""
    cls: Any = type(ALL_ATTENTION_FUNCTIONS)
    original = cls.get_interface

    def get(self: Any, name: str, default: Attend) -> Attend:
        return wrap(original(self, name, default))

    cls.get_interface = get
    try:
        yield
    finally:
        cls.get_interface = original


class Listener:
    """What whoever feeds a model says: tokens so far, where rows begin `[B]`, what a static cache holds (0: none)."""

    def __init__(self) -> None:
        self.total, self.capacity, self.starts = 0, 0, torch.zeros(1, dtype=torch.long)


class Oracle(Listener):
    """Cuts the attention of some modules down to what a method keeps of what their own mask keeps.

    Calls of a `(module, phase)` in `dense` are left as they are. `kept` of `visible` pairs (row, head, query, key)
    were attended to in the calls cut down.
    """

    def __init__(
        self, modules: Collection[nn.Module], method: Method, dense: Collection[tuple[nn.Module, str]] = ()
    ) -> None:
        super().__init__()
        self.modules, self.method, self.dense = set(modules), method, set(dense)
        self.kept, self.visible = 0, 0

    def wrap(self, base: Attend) -> Attend:
        """`base` with the method's mask, for the modules in question."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            phase = self._phase(query.shape[2])
            if module in self.modules and phase in self.method.phases and (module, phase) not in self.dense:
                causal = kwargs.pop("is_causal", None)
                causal = getattr(module, "is_causal", True) if causal is None else causal
                attention_mask = self._mask(query, key, attention_mask, bool(causal))
            return base(module, query, key, value, attention_mask, **kwargs)

        return attend

    def _phase(self, queries: int) -> str:
        if queries == 1 or (self.total > queries and queries <= self.method.steps):
            return "decode"
        return "chunk" if self.total > queries else "prefill"

    def _mask(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The model's own mask and the method's as one additive mask."""
        slots = k.shape[2]
        i, j, starts = self._places(q.shape[2], slots)
        keep = self.method.pattern(q, k[:, :, : len(j)], i, j, starts.expand(q.shape[0]))
        keep = nn.functional.pad(keep, (0, slots - len(j)))
        own, bias = torch.ones(q.shape[2], slots, dtype=torch.bool), torch.zeros(())
        if mask is None and causal:
            own = torch.arange(slots) <= i[:, None]
        elif mask is not None and mask.dtype == torch.bool:
            own = mask[..., :slots]
        elif mask is not None:
            bias = mask[..., :slots]
            own = bias > torch.finfo(bias.dtype).min / 2
        pairs = (*q.shape[:3], slots)
        self.kept += int((keep & own).expand(pairs).sum())
        self.visible += int(own.expand(pairs).sum())
        keep = keep & own
        return bias.to(q.dtype).expand(keep.shape).masked_fill(~keep, torch.finfo(q.dtype).min)

    def _places(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of queries `[Lq]`, of the keys in use `[<= Lk]` and of each row's start. Raises UnjudgedError."""
        if keys in (self.total, self.capacity):
            return torch.arange(self.total - queries, self.total), torch.arange(self.total), self.starts
        if queries == keys:  # a sequence of its own, such as patches of bytes
            return torch.arange(queries), torch.arange(keys), torch.zeros(1, dtype=torch.long)
        raise UnjudgedError(f"{queries} queries and {keys} keys after {self.total} tokens")
