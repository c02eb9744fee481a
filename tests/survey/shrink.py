"""The configuration of a type made small: rules by name for numbers, and a choice of layers that has every kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from .sizes import EXCEPTIONS, HEAD_DIM, HEADS, KV_HEADS, LAYERS, small

SPECIAL = {"pad": 0, "bos": 1, "eos": 2}
_MISSING = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}


def shrink(config: PreTrainedConfig, ids: Iterator[int]) -> PreTrainedConfig:
    """The same configuration of a tiny model; special tokens get the numbers `ids`. Raises what its class raises."""
    changed = _changed(config, ids)
    parts = {name: value.to_dict() for name, value in changed.items() if isinstance(value, PreTrainedConfig)}
    try:
        return type(config)(**{**changed, **parts})
    except Exception:  # some take their parts as objects only
        if not parts:
            raise
        return type(config)(**changed)


def read(config: Any, name: str, default: Any) -> Any:
    """An attribute; the default where layers differ in it and Transformers will not name one."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def _changed(config: PreTrainedConfig, ids: Iterator[int]) -> dict[str, Any]:
    """What the class has to be given to make the tiny configuration."""
    layers = _layers(config)
    changed: dict[str, Any] = {}
    fields = inspect.signature(type(config)).parameters
    latent = "kv_lora_rank" in fields and read(config, "kv_lora_rank", fields["kv_lora_rank"].default)
    for name, field in fields.items():
        value = read(config, name, field.default)
        new = _smaller(name, value, ids, *layers)
        if latent and name == "num_key_value_heads":
            new = HEADS
        scalar = value is None or isinstance(value, (bool, str, float))
        if new is not value or (scalar and value != field.default):
            changed[name] = new
    words = EXCEPTIONS.get(config.model_type or type(config).__name__, {})
    return {**changed, **{name: word for name, word in words.items() if word is not None or name in fields}}


def _smaller(name: str, value: Any, ids: Iterator[int], count: int, chosen: list[int]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return shrink(value, ids)
    if name.endswith(("token_id", "token_index")) and value is not None:
        known = [n for word, n in SPECIAL.items() if name.startswith(word)]
        return known[0] if known else next(ids)
    if value is None:
        return _MISSING.get(name)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return small(name, value)
    if name == "rope_parameters":
        return _rope(value)
    if isinstance(value, (list, tuple)) and count and len(value) == count:
        return [small(name, v) if type(v) is int else v for v in (value[n] for n in chosen)]
    return value


def _rope(value: Any) -> Any:
    """Rotary settings, whose sections have to fit the head."""
    if not isinstance(value, dict):
        return value
    return {k: [2, 3, 3] if k == "mrope_section" else _rope(v) for k, v in value.items()}


def _layers(config: PreTrainedConfig) -> tuple[int, list[int]]:
    """How many layers there are, and which to keep, so that each kind of them is there in turn."""
    count = read(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        return 0, []
    lists = [v for _, v in sorted(vars(config).items()) if isinstance(v, (list, tuple)) and len(v) == count]
    rows = [repr(row) for row in zip(*lists, strict=True)] or [""] * count
    kinds = [rows.index(kind) for kind in dict.fromkeys(rows)]
    return count, [kinds[n % len(kinds)] for n in range(LAYERS)]
