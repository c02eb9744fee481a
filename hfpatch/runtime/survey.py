"""Which attention layers a model has: those of its text decoder that go through the AttentionInterface, by kind."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .attention_source import AttentionSource, attention_source

UNDERSTOOD = frozenset(
    {"dropout", "scaling", "is_causal", "position_ids", "output_attentions", "attention_mask"}
    | {"use_cache", "sliding_window", "softcap", "s_aux", "sinks"}
)
_NATIVE_SPARSE = ("indexed", "sparse", "indices", "compress")
_TOWERS = ("vision", "visual", "image", "video", "audio", "speech")


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module of the model that goes through the AttentionInterface."""

    name: str
    module: nn.Module
    index: int
    kind: str


@dataclass(frozen=True)
class Survey:
    """The softmax attention layers of the text decoder `root`, by decoder layer, and what is not among them."""

    root: nn.Module
    num_layers: int
    layers: list[AttentionLayer]
    skipped: list[tuple[str, str]] = field(default_factory=list)


def survey(model: nn.Module) -> Survey:
    """Find the attention layers of the model's text decoder. Raises UnsupportedModelError."""
    root, prefix = _text_root(model)
    towers = tuple(_tower_configs(_config_of(model)))
    layers: list[AttentionLayer] = []
    skipped: list[tuple[str, str]] = []
    foreign: set[str] = set()
    for name, module in ((f"{prefix}{n}", m) for n, m in root.named_modules()):
        if isinstance(module, PreTrainedModel):
            continue
        source = attention_source(module)
        if source is None or not hasattr(module, "config"):
            cls = type(module).__name__
            if "attention" in cls.lower() and not any(_is_attention(child) for child in module.children()):
                foreign.add(cls)
        elif isinstance(module.config, towers):
            skipped.append((name, "a vision or audio tower"))
        elif _is_cross(name, module):
            skipped.append((name, "cross or bidirectional attention"))
        else:
            layers.append(AttentionLayer(name, module, _index(name, module, len(layers)), _kind(name, module, source)))
    if not layers:
        raise UnsupportedModelError(_refusal(model, foreign, bool(skipped)))
    count = getattr(layers[0].module.config, "num_hidden_layers", None) or 0
    if len({x.index for x in layers}) < len(layers):
        layers, count = [AttentionLayer(x.name, x.module, n, x.kind) for n, x in enumerate(layers)], len(layers)
    return Survey(root, max(count, max(x.index for x in layers) + 1), layers, skipped)


def _index(name: str, module: nn.Module, place: int) -> int:
    """Decoder layer of an attention module: as it says itself, else as its name says, else its place among them."""
    own: Any = getattr(module, "layer_idx", None)
    if isinstance(own, int) and own >= 0:
        return own
    return next((int(part) for part in name.split(".") if part.isdecimal()), place)


def _text_root(model: nn.Module) -> tuple[nn.Module, str]:
    """The part of the model that decodes text, and the prefix of its modules' names; the model itself in doubt."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    if not isinstance(decoder, nn.Module) or decoder is model or not any(map(_dispatches, decoder.modules())):
        return model, ""
    name = next((n for n, m in model.named_modules() if m is decoder), None)
    return (decoder, f"{name}.") if name else (model, "")


def _dispatches(module: nn.Module) -> bool:
    return not isinstance(module, PreTrainedModel) and attention_source(module) is not None


def _config_of(model: nn.Module) -> Any:
    return next((m.config for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def _tower_configs(config: Any) -> Iterator[type]:
    """The classes of the configs of what sees and hears."""
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is None:
            continue
        if any(word in name for word in _TOWERS):
            yield type(part)
        else:
            yield from _tower_configs(part)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _is_cross(name: str, module: nn.Module) -> bool:
    leaf = name.rsplit(".", 1)[-1].lower()
    own_mask = getattr(module, "is_decoder", False)  # some decoders leave causality to the mask alone
    return "cross" in leaf or "encoder_attn" in leaf or (getattr(module, "is_causal", True) is False and not own_mask)


def _kind(name: str, module: Any, source: AttentionSource) -> str:
    """`full`, `sliding`, `chunked`, `native-sparse`, or the name of what else the module hands to its attention."""
    config, index = module.config, getattr(module, "layer_idx", None)
    special = sorted(source.named - UNDERSTOOD)
    choosing = source.own_mask or any("indices" in n for n in special)
    if special and not choosing:
        return special[0].replace("_", "-")
    types_ = getattr(config, "layer_types", None)
    label = getattr(module, "layer_type", None)
    if isinstance(types_, (list, tuple)) and isinstance(index, int) and 0 <= index < len(types_):
        label = types_[index]
    if isinstance(label, str):
        for key, kind in (
            ("sliding", "sliding"),
            ("chunked", "chunked"),
            *((n, "native-sparse") for n in _NATIVE_SPARSE),
        ):
            if key in label:
                return kind
        return "native-sparse" if choosing and label != "full_attention" else "full"
    if choosing:
        return "native-sparse"
    if getattr(module, "is_sliding", False):
        return "sliding"
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if (windowed or getattr(module, "sliding_window", None)) and _makes_windows(module, source):
        return "sliding"
    return "sliding" if any(part.startswith("local") for part in name.split(".")) else "full"


def _makes_windows(module: nn.Module, source: AttentionSource) -> bool:
    """Whether a model's code does more with the size of a window than keep it; of others' code that is not known."""
    file = sys.modules.get(type(module).__module__)
    names = {*source.scope, *source.named, *(vars(file) if file else ())}
    return not type(module).__module__.startswith("transformers.") or any("sliding" in n for n in names)


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
