"""Where hfpatch meets Transformers: finding attention modules, dispatching their calls, undoing it all.

Each patched attention module gets a copy of its config whose attention implementation is "hfpatch", a pre-hook
that adds hidden states and cache to the call's keywords, and its runtime as a plain attribute. The model's own
config, masks, caches and `generate` stay those of the implementation it was loaded with.
"""

import copy
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from .cache_crop import kept_by, open_layer
from .cache_state import Rows, State, cache_states
from .errors import UnsupportedModelError
from .padding import RowGroup, row_groups
from .selection import SinkWindow

NAME = "hfpatch"
RUNTIME = "_hfpatch"
CONTEXT = "hfpatch_ctx"
QUERIES = "_hfpatch_queries"
DISPATCH = "ALL_ATTENTION_FUNCTIONS"

_HARMLESS = frozenset(
    {
        *("dropout", "scaling", "is_causal", "position_ids", "use_cache", "cache_position", "is_first_iteration"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "labels"),
        *("logits_to_keep", "num_logits_to_keep", "tokens_to_keep", "num_items_in_batch"),
        *("sliding_window", "softcap", "s_aux", "sinks"),
    }
)
_UNKNOWN = -1
_NATIVE_SPARSE = ("indexed", "sparse", "indices")


class Runtime(Protocol):
    """What a patched module carries: it answers the module's attention calls."""

    base_config: Any

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def retains(self) -> bool: ...

    def run(self, raw: "RawCall") -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module of the model that goes through the AttentionInterface."""

    name: str
    module: nn.Module
    index: int
    kind: str


@dataclass(frozen=True)
class Survey:
    """The model's softmax attention layers, by decoder layer, and what is not among them."""

    num_layers: int
    layers: list[AttentionLayer]
    skipped: list[tuple[str, str]] = field(default_factory=list)


def _functions(cls: Any) -> Iterator[types.FunctionType]:
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        for value in vars(base).values():
            fn = inspect.unwrap(value) if callable(value) else None
            if isinstance(fn, types.FunctionType):
                yield fn


@cache
def _dispatching(cls: Any) -> types.FunctionType | None:
    return next((fn for fn in _functions(cls) if DISPATCH in fn.__code__.co_names), None)


def dispatching_function(module: nn.Module) -> types.FunctionType | None:
    """The function of the module's class that looks up the AttentionInterface, if any."""
    cls: Any = type(module)
    return _dispatching(cls)


def _is_cross(name: str, module: nn.Module) -> bool:
    leaf = name.rsplit(".", 1)[-1].lower()
    return "cross" in leaf or "encoder_attn" in leaf or getattr(module, "is_causal", True) is False


def _kind(module: nn.Module) -> str:
    """`full`, `sliding`, `chunked` or `native-sparse`."""
    config, index = module.config, getattr(module, "layer_idx", None)
    types_ = getattr(config, "layer_types", None)
    label = getattr(module, "layer_type", None)
    if isinstance(types_, (list, tuple)) and isinstance(index, int) and index < len(types_):
        label = types_[index]
    if isinstance(label, str):
        for key, kind in (
            ("sliding", "sliding"),
            ("chunked", "chunked"),
            *((n, "native-sparse") for n in _NATIVE_SPARSE),
        ):
            if key in label:
                return kind
        return "full"
    if getattr(module, "is_sliding", False) or getattr(module, "sliding_window", None):
        return "sliding"
    dispatch = dispatching_function(module)
    reads_window = dispatch is not None and "sliding_window" in (
        *dispatch.__code__.co_names,
        *dispatch.__code__.co_consts,
    )
    return "sliding" if reads_window and getattr(config, "sliding_window", None) else "full"


def survey(model: nn.Module) -> Survey:
    """Find the attention layers of the model's text decoder. Raises UnsupportedModelError."""
    root, prefix = _text_root(model)
    layers: list[AttentionLayer] = []
    skipped: list[tuple[str, str]] = []
    foreign: set[str] = set()
    found = [(f"{prefix}{n}", m) for n, m in root.named_modules()]
    for name, module in found:
        if isinstance(module, PreTrainedModel):
            continue
        cls = type(module)
        if dispatching_function(module) is None or not hasattr(module, "config"):
            if "attention" in cls.__name__.lower() and not any(True for _ in module.children() if _is_attention(_)):
                foreign.add(cls.__name__)
            continue
        if _is_cross(name, module):
            skipped.append((name, "cross or bidirectional attention"))
            continue
        index = getattr(module, "layer_idx", None)
        layers.append(AttentionLayer(name, module, index if isinstance(index, int) else len(layers), _kind(module)))
    if not layers:
        raise UnsupportedModelError(_refusal(model, foreign, bool(skipped)))
    if len({x.index for x in layers}) < len(layers):
        layers = [AttentionLayer(x.name, x.module, n, x.kind) for n, x in enumerate(layers)]
    config = layers[0].module.config
    count = getattr(config, "num_hidden_layers", None) or 0
    return Survey(max(count, layers[-1].index + 1), layers, skipped)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _text_root(model: nn.Module) -> tuple[nn.Module, str]:
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    if not isinstance(decoder, nn.Module) or decoder is model:
        return model, ""
    name = next((n for n, m in model.named_modules() if m is decoder), None)
    return (decoder, f"{name}.") if name else (model, "")


def _refusal(model: nn.Module, foreign: set[str], bidirectional: bool) -> str:
    what = type(model).__name__
    if bidirectional:
        return f"{what} cannot be patched: its attention is not causal. Use a causal language model."
    if foreign:
        classes = ", ".join(sorted(foreign))
        return (
            f"{what} cannot be patched: its attention ({classes}) does not go through Transformers' "
            "AttentionInterface. Use a model type that does, such as Llama, Qwen3 or Gemma3; "
            "`hfpatch check MODEL` tells for any model."
        )
    return (
        f"{what} cannot be patched: it has no softmax attention layers. Use a model with attention, such as "
        "Llama, Qwen3 or Gemma3; `hfpatch check MODEL` tells for any model."
    )


def attach(module: nn.Module, runtime: Runtime) -> None:
    """Send the module's attention calls to `runtime`."""
    runtime.base_config = module.config
    config: Any = copy.copy(module.config)
    config._attn_implementation_internal = NAME
    module.config = config
    setattr(module, RUNTIME, runtime)
    module.register_forward_pre_hook(_add_context, with_kwargs=True)
    if "queries" in runtime.needs:
        _query_source(module).register_forward_hook(_QueryHook(module))


def detach(module: nn.Module) -> None:
    """Give the module back exactly as `attach` found it."""
    module.config = getattr(module, RUNTIME).base_config
    delattr(module, RUNTIME)
    for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _add_context]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    vars(module).pop(QUERIES, None)
    for child in module.children():
        for key in [k for k, hook in child._forward_hooks.items() if isinstance(hook, _QueryHook)]:
            del child._forward_hooks[key]


class _QueryHook:
    """Puts what the query projection (or its norm) gave into the attention module, for the call that follows."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        vars(self.attention).setdefault(QUERIES, {})[threading.get_ident()] = output


def _query_source(module: nn.Module) -> nn.Module:
    """The child whose output is the query before RoPE. Raises UnsupportedModelError."""
    children = dict(module.named_children())
    if "q_norm" in children:
        return children["q_norm"]
    if "q_proj" in children and not {"k_norm", "q_layernorm"} & set(children):
        return children["q_proj"]
    raise UnsupportedModelError(
        f"{type(module).__name__} has neither a q_norm nor a q_proj of its own, so its queries before RoPE cannot be "
        "read; use a method or router that does not need them."
    )


def check_queries(module: nn.Module) -> None:
    """Raise UnsupportedModelError when the module's queries before RoPE cannot be read."""
    _query_source(module)


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache of keys: releases change the keyword's name, not what it is."""
    cls = type(value)
    return issubclass(cls, Cache) or (hasattr(cls, "get_seq_length") and hasattr(cls, "update"))


def _add_context(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    hidden = args[0] if args else kwargs.get("hidden_states")
    cache = next((x for x in chain(kwargs.values(), args) if is_cache(x)), None)
    kwargs[CONTEXT] = (hidden, cache)
    if module.__dict__[RUNTIME].retains:
        open_layer(cache, getattr(module, "layer_idx", None))
    return args, kwargs


class _ModuleView:
    """The attention module with the config it had, for base functions that read its implementation's name."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.__dict__.update(_module=module, config=config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(eq=False)
class RawCall:
    """One call as Transformers makes it, with its conventions explained.

    q `[B, Hq, Lq, D]`, k and v `[B, Hkv, Lk', D]` where Lk' may include unused slots of a static cache.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    kwargs: dict[str, Any]
    hidden: Tensor | None
    cache: Any
    base_config: Any
    _total: int | None = None

    @cached_property
    def queries(self) -> Tensor | None:
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
            length = self.k.shape[2] if self.cache is None else _cache_length(self.cache, self.layer_idx, self.k)
            self._total = _UNKNOWN if length is None else length
        return self._total

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
        config = self.base_config  # a config's own __getattribute__ is slow, but torch.compile follows no other
        own = vars(config) if is_compiling() else object.__getattribute__(config, "__dict__")
        return str(own.get("_attn_implementation_internal") or self.base_config._attn_implementation)

    def base(self) -> tuple[Tensor, Tensor | None]:
        """The call as the unpatched model would make it: `(out [B, Lq, Hq, Dv], weights or None)`."""
        module: Any = self.module
        scope = dispatching_function(module).__globals__  # type: ignore[union-attr]
        name = self.base_name
        fn: Callable[..., Any] = scope[DISPATCH].get_interface(name, scope.get("eager_attention_forward"))
        if "flash" in name or "paged" in name or "/" in name:
            module = _ModuleView(module, self.base_config)
        return fn(module, self.q, self.k, self.v, self.mask, **self.kwargs)

    def blocker(self) -> str | None:
        """Why this call has to run dense, or None."""
        kw = self.kwargs
        if kw.get("sliding_window"):
            return "a sliding window"
        if kw.get("dropout"):
            return "attention dropout"
        if kw.get("is_causal") is False or getattr(self.module, "is_causal", True) is False:
            return "bidirectional attention"
        if kw.get("output_attentions"):
            return "attention weights were asked for"
        if not kw.keys() <= _HARMLESS:
            odd = sorted(k for k, v in kw.items() if v is not None and v is not False and k not in _HARMLESS)
            if odd:
                return f"the call carries {', '.join(odd)}"
        if self.mask is not None and not isinstance(self.mask, Tensor):
            return f"a {type(self.mask).__name__} mask"
        if self.total == _UNKNOWN:
            return f"a {type(self.cache).__name__} that does not tell its length"
        if self.total > self.k.shape[2] and self.kept is None:
            return "a cache that has dropped keys"
        return None

    @property
    def kept(self) -> SinkWindow | None:
        """Which keys the cache has kept, when hfpatch has dropped the others."""
        return kept_by(self.cache, self.layer_idx) if self.total > self.k.shape[2] else None

    @property
    def layer_idx(self) -> int | None:
        """The layer's index in the cache."""
        return getattr(self.module, "layer_idx", None)

    def groups(self) -> list[RowGroup] | str:
        """Rows by the range of their real tokens, or the reason why the mask cannot be read so."""
        mask = self.mask
        if mask is None:
            return [RowGroup(tuple(range(self.q.shape[0])), 0, self.total)]
        if isinstance(mask, Tensor) and mask.shape[0] == 1 < self.q.shape[0]:
            mask = mask.expand(self.q.shape[0], *mask.shape[1:])
        return row_groups(mask, self.q.shape[0], self.q.shape[2], self.total, id(self.module))

    def states(self, name: str) -> dict[Rows, State]:
        """What methods remember for this module and cache, by rows."""
        return cache_states(self.cache, self.layer_idx, name)


def _cache_length(cache: Any, layer_idx: int | None, key: Tensor) -> int | None:
    """Tokens a cache has seen: asked of this layer, else of an earlier one, else of the layer that holds `key`."""
    layers = getattr(cache, "layers", ())
    own = layers[layer_idx] if layer_idx is not None and layer_idx < len(layers) else None
    if own.__class__ is DynamicLayer and own.keys is key:
        return int(key.shape[2])  # as its get_seq_length has it
    found = None if layer_idx is None else _length_at(cache, layer_idx)
    if found is not None:
        return found
    holders = (n for n, x in enumerate(layers) if getattr(x, "keys", None) is key)
    for index in chain(() if layer_idx is None else range(layer_idx - 1, -1, -1), holders):
        if (found := _length_at(cache, index)) is not None:
            return found
    return None


def _length_at(cache: Any, index: int) -> int | None:
    """Tokens that layer `index` of a cache has seen; None for layers without a length, such as linear attention's."""
    try:
        return int(cache.get_seq_length(index))
    except (AttributeError, IndexError, NotImplementedError, ValueError):
        return None


def hfpatch_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function behind the name "hfpatch": hands the call to the module's runtime."""
    hidden, cache = kwargs.pop(CONTEXT, (None, None))
    runtime = getattr(module, RUNTIME, None)
    if runtime is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is set to attention implementation 'hfpatch' without a patch; "
            "load the model with its usual implementation and call patch_model(model, ...)."
        )
    return runtime.run(RawCall(module, query, key, value, attention_mask, kwargs, hidden, cache, runtime.base_config))


def is_compiling() -> bool:
    """Whether torch.compile is tracing, when Python-side counting would break the graph."""
    return torch.compiler.is_compiling()


AttentionInterface.register(NAME, hfpatch_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
