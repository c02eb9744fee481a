"""Where hfpatch meets Transformers: sending the calls of attention modules to their runtime, and undoing it all.

Each patched attention module gets a copy of its config whose attention implementation is "hfpatch", a pre-hook
that adds hidden states and cache to the call's keywords, and its runtime as a plain attribute. The model's own
config, masks, caches and `generate` stay those of the implementation it was loaded with.
"""

import copy
import inspect
import threading
from itertools import chain
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..core.call import Forward
from ..errors import UnsupportedModelError
from .attention_source import AttentionSource, attention_source
from .cache_slot import is_cache
from .cropping import Cropping
from .raw_call import QUERIES, Context, RawCall

NAME = "hfpatch"
RUNTIME = "_hfpatch"
CONTEXT = "hfpatch_ctx"
FORWARD = "hfpatch_forward"


class Runtime(Protocol):
    """What a patched module carries: it answers the module's attention calls."""

    base_config: Any
    model_config: Any
    source: AttentionSource

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def cropping(self) -> Cropping: ...

    def run(self, raw: RawCall) -> tuple[Tensor, Tensor | None]: ...


def runtime_of(module: nn.Module) -> Any:
    """The runtime that answers the module's attention calls; None for a module that is not patched."""
    return vars(module).get(RUNTIME)


def attach(module: nn.Module, runtime: Runtime) -> None:
    """Send the module's attention calls to `runtime`."""
    source = attention_source(module)
    assert source is not None  # the survey lists no other modules
    runtime.base_config, runtime.source = module.config, source
    config: Any = copy.copy(module.config)
    config._attn_implementation_internal = NAME
    setattr(module, RUNTIME, runtime)
    module.config = config
    module.register_forward_pre_hook(_add_context, with_kwargs=True)
    if "q_pre_rope" in runtime.needs:
        _query_source(module).register_forward_hook(_QueryHook(module))


def detach(module: nn.Module) -> None:
    """Give the module back exactly as `attach` found it, also when that was cut short."""
    runtime = runtime_of(module)
    if runtime is not None:
        module.config = runtime.base_config
    vars(module).pop(RUNTIME, None)
    _remove_pre_hook(module, _add_context)
    vars(module).pop(QUERIES, None)
    for child in module.children():
        for key in [k for k, hook in child._forward_hooks.items() if isinstance(hook, _QueryHook)]:
            del child._forward_hooks[key]


def open_forwards(root: nn.Module) -> bool:
    """Let each forward pass of the text decoder `root` carry something for its layers to share; tells if it can."""
    takes = inspect.signature(root.forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in takes):
        return False
    root.register_forward_pre_hook(_add_forward, with_kwargs=True)
    return True


def close_forwards(root: nn.Module) -> None:
    """Undo `open_forwards`."""
    _remove_pre_hook(root, _add_forward)


def _remove_pre_hook(module: nn.Module, hook: Any) -> None:
    for key in [k for k, found in module._forward_pre_hooks.items() if found is hook]:
        module._forward_pre_hooks_with_kwargs.pop(key, None)
        del module._forward_pre_hooks[key]


def _add_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    kwargs[FORWARD] = Forward()
    return args, kwargs


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


def _add_context(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    hidden = args[0] if args else kwargs.get("hidden_states")
    cache = next((x for x in chain(kwargs.values(), args) if is_cache(x)), None)
    kwargs[CONTEXT] = Context(hidden, cache, kwargs.pop(FORWARD, None))
    module.__dict__[RUNTIME].cropping.before(cache, getattr(module, "layer_idx", None))
    return args, kwargs


def hfpatch_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function behind the name "hfpatch": hands the call to the module's runtime."""
    context = kwargs.pop(CONTEXT, Context())
    runtime = getattr(module, RUNTIME, None)
    if runtime is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is set to attention implementation 'hfpatch' without a patch; "
            "load the model with its usual implementation and call patch_model(model, ...)."
        )
    return runtime.run(RawCall(module, query, key, value, attention_mask, kwargs, context, runtime))


AttentionInterface.register(NAME, hfpatch_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
