"""One attention call as Transformers makes it, with its conventions explained."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..core.call import Forward
from .attention_source import DISPATCH, AttentionSource, keywords_read
from .cache_keep import kept_by
from .cache_slot import find_slot, has_room, is_paged, tokens_seen
from .cache_state import Rows, State, cache_layer, cache_states
from .kept import Kept
from .packing import starts_again
from .padding import length_with_groups, row_groups
from .row_slice import RowSlice
from .survey import UNDERSTOOD

QUERIES = "_hfpatch_queries"
_UNKNOWN = -1


class Context(NamedTuple):
    """What the attention module was called with and does not hand on to the attention function."""

    hidden: Tensor | None = None
    cache: Any = None
    forward: Forward | None = None


class Seat(Protocol):
    """What is known of a patched module before its calls: its own config, its model's, and its source."""

    base_config: Any
    model_config: Any
    source: AttentionSource


@dataclass(eq=False)
class RawCall:
    """q `[B, Hq, Lq, D]`, k and v `[B, Hkv, Lk', D]` where Lk' may include unused slots of a static cache."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    kwargs: dict[str, Any]
    context: Context
    seat: Seat
    _total: int | None = None
    _slot: int | None = None
    _groups: list[RowSlice] | str | None = None
    _sought: bool = False
    _kept: Kept | None = None
    _asked: bool = False

    @property
    def cache(self) -> Any:
        """The cache the call uses, or None."""
        return self.context.cache

    @cached_property
    def q_pre_rope(self) -> Tensor | None:
        """Queries before RoPE `[B, Lq, Hq, D]`, where a method needs them and their shape can be told."""
        found = vars(self.module).get(QUERIES, {}).pop(threading.get_ident(), None)
        b, hq, lq, _ = self.q.shape
        if found is None or found.numel() % (b * lq * hq):
            return None
        if found.ndim == 4 and found.shape[1] == hq and found.shape[2] == lq:
            return found.transpose(1, 2)
        return found.reshape(b, lq, hq, -1)

    @property
    def phase(self) -> str:
        """`decode` for one query, `chunk` for several after earlier ones, else `prefill`."""
        if self.q.shape[2] == 1:
            return "decode"
        return "chunk" if self.total > self.q.shape[2] else "prefill"

    @property
    def total(self) -> int:
        """Tokens seen so far, this call's included, asked of the cache after its update."""
        if self._total is None:  # by hand: before Python 3.12 a cached_property takes a lock
            length: int | None = self.k.shape[2]
            if self.cache is not None:
                layer, positions = getattr(self.module, "layer_idx", None), self.kwargs.get("position_ids")
                length = tokens_seen(
                    self.cache, self.slot, layer, self.k, positions, id(self.module), self._read_length
                )
            self._total = _UNKNOWN if length is None else length
        return self._total

    def _read_length(self, length: Tensor) -> int:
        return length_with_groups(length, self.mask, self.q.shape[0], self.q.shape[2])

    @property
    def slot(self) -> int | None:
        """Index of the cache layer that holds this call's keys."""
        if not self._sought and self.cache is not None:
            self._slot = find_slot(self.cache, getattr(self.module, "layer_idx", None), self.k)
        self._sought = True
        return self._slot

    @property
    def scale(self) -> float:
        """Factor on q.k."""
        scale = self.kwargs.get("scaling")
        return self.q.shape[-1] ** -0.5 if scale is None else float(scale)

    @property
    def softcap(self) -> float | None:
        """Logit soft-cap; none under sdpa, which never applies one (old releases drop it silently, new ones raise)."""
        softcap = self.kwargs.get("softcap")
        return None if softcap is None or self.base_name == "sdpa" else softcap

    @property
    def sinks(self) -> Tensor | None:
        """Sink logits `[Hq]`."""
        sinks = self.kwargs.get("s_aux")
        return self.kwargs.get("sinks") if sinks is None else sinks

    @property
    def base_name(self) -> str:
        """Name of the attention implementation the model had."""
        config = self.seat.base_config  # a config's own __getattribute__ is slow, but torch.compile follows no other
        own = vars(config) if is_compiling() else object.__getattribute__(config, "__dict__")
        return str(own.get("_attn_implementation_internal") or config._attn_implementation)

    @property
    def base_function(self) -> Callable[..., Any]:
        """The attention function the unpatched model would call."""
        scope = self.seat.source.scope
        return scope[DISPATCH].get_interface(self.base_name, scope.get("eager_attention_forward"))

    def base(self) -> tuple[Tensor, Tensor | None]:
        """The call as the unpatched model would make it: `(out [B, Lq, Hq, Dv], weights or None)`."""
        module: Any = self.module
        name = self.base_name
        if "flash" in name or "paged" in name or "/" in name:
            module = _ModuleView(module, self.seat.base_config)
        return self.base_function(module, self.q, self.k, self.v, self.mask, **self.kwargs)

    def blocker(self) -> str | None:
        """Why this call has to run dense, or None."""
        return self.unserved() or self._unserved_keys()

    @property
    def forgetful(self) -> str | None:
        """Why a method that remembers has to run dense: caches of old releases without layers, or None."""
        if self.cache is None or cache_layer(self.cache, self.slot) is not None:
            return None
        return f"a {type(self.cache).__name__} without layers that could carry what is remembered"

    def unserved(self) -> str | None:
        """Why a call that asks for such things has to run dense, whatever the keys; or None."""
        kw = self.kwargs
        if self.cache is not None and is_paged(self.cache):
            return "continuous batching, whose cache keeps several sequences in pages"
        if kw.get("sliding_window"):
            return "a sliding window"
        if kw.get("dropout"):
            return "attention dropout"
        if self._bidirectional:
            return "bidirectional attention"
        if (
            kw.get("output_attentions")
            or _wants_weights(self.seat.base_config)
            or _wants_weights(self.seat.model_config)
        ):
            return "attention weights were asked for"
        if not kw.keys() <= UNDERSTOOD and (odd := self._odd_keywords()):
            return f"the call carries {', '.join(odd)}"
        if self.sinks is not None and self.sinks.ndim != 1:
            return "sink logits that differ between tokens"
        if self.mask is not None and not isinstance(self.mask, Tensor):
            return f"a {type(self.mask).__name__} mask"
        return None

    @property
    def _bidirectional(self) -> bool:
        if self.kwargs.get("is_causal") is False:
            return True
        if getattr(self.module, "is_causal", True) is not False:
            return False
        masked = self.mask is not None or self.q.shape[2] == 1
        return not (getattr(self.module, "is_decoder", False) and masked)

    def _odd_keywords(self) -> list[str]:
        """Keywords with a value that the base function looks at or the module names, and that we do not know."""
        odd = sorted(k for k, v in self.kwargs.items() if v is not None and v is not False and k not in UNDERSTOOD)
        if not odd:
            return []
        read, named = keywords_read(self.base_function), self.seat.source.named
        return [k for k in odd if read is None or k in read or k in named]

    def _unserved_keys(self) -> str | None:
        total, keys, queries = self.total, self.k.shape[2], self.q.shape[2]
        if self.cache is None and keys != queries:
            return "more keys than queries and no cache that says where they come from"
        if total == _UNKNOWN:
            return f"a {type(self.cache).__name__} that does not tell its length"
        if total < keys and not has_room(self.cache, self.slot, keys):
            return "keys that are not those of the cache"
        if total > keys and self.kept is None:
            return "a cache that has dropped keys"
        if self.mask is None and queries > 1 and starts_again(self.kwargs.get("position_ids"), id(self.module)):
            return "packed sequences: positions start again and there is no mask"
        return None

    @property
    def kept(self) -> Kept | None:
        """What the cache had left before this call, when hfpatch has dropped keys."""
        if not self._asked:
            self._kept, self._asked = kept_by(self.cache, self.slot), True
        return self._kept

    def groups(self) -> list[RowSlice] | str:
        """Rows by the range of their real tokens, or the reason why the mask cannot be read so."""
        if self._groups is None:
            self._groups = self._read_groups()
        return self._groups

    def _read_groups(self) -> list[RowSlice] | str:
        mask = self.mask
        if mask is None:
            return [RowSlice(tuple(range(self.q.shape[0])), 0, self.total)]
        if isinstance(mask, Tensor) and mask.shape[0] == 1 < self.q.shape[0]:
            mask = mask.expand(self.q.shape[0], *mask.shape[1:])
        return row_groups(mask, self.q.shape[0], self.q.shape[2], self.total, id(self.module))

    def states(self, name: str) -> dict[Rows, State]:
        """What the methods called `name` remember for the cache layer in use, by rows."""
        return cache_states(self.cache, self.slot, name)


class _ModuleView:
    """The attention module with the config it had, for base functions that read its implementation's name."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.__dict__.update(_module=module, config=config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _wants_weights(config: Any) -> bool:
    """Whether a config asks for attention weights at every call."""
    if config is None:
        return False
    own = vars(config) if is_compiling() else object.__getattribute__(config, "__dict__")
    return bool(own.get("_output_attentions"))


def is_compiling() -> bool:
    """Whether torch.compile is tracing, when Python-side counting would break the graph."""
    return torch.compiler.is_compiling()
