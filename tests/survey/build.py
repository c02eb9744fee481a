"""A tiny random model of any type Transformers knows, from its own default configuration made small."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .sizes import ELSEWHERE, EXCEPTIONS, HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB, small

CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION: dict[str, str] = {
    k: v for k, v in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if k not in CAUSAL
}
FIRST_PLAIN_ID = 48
SPECIAL = {"pad": 0, "bos": 1, "eos": 2}
MISSING = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model of that type in eval mode with random weights."""
    cls: Any = getattr(transformers, CAUSAL.get(name) or VISION[name])
    whole = CONFIG_MAPPING[name]()
    own = next((c for c in sub_configs(whole) if type(c) is cls.config_class), whole)
    config = shrink(own, iter(range(len(SPECIAL), FIRST_PLAIN_ID)))
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).float().eval()
        zoo.randomize(model)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def sub_configs(config: Any) -> list[Any]:
    return [v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig)]


def shrink(config: Any, ids: Iterator[int]) -> Any:
    """The same configuration of a tiny model; special tokens get the numbers `ids`."""
    chosen = layer_choice(config)
    changed: dict[str, Any] = {}
    fields = inspect.signature(type(config)).parameters
    latent = "kv_lora_rank" in fields and read(config, "kv_lora_rank", fields["kv_lora_rank"].default)
    for name, parameter in fields.items():
        value = read(config, name, parameter.default)
        new = smaller(name, value, ids, chosen, config)
        if latent and name == "num_key_value_heads":
            new = HEADS
        plain = value is None or isinstance(value, (bool, str, float))
        if new is not value or (plain and value != parameter.default):
            changed[name] = new
    return type(config)(**{**changed, **EXCEPTIONS.get(config.model_type or type(config).__name__, {})})


def read(config: Any, name: str, default: Any) -> Any:
    """An attribute; the default where layers differ in it and Transformers will not name one."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def smaller(name: str, value: Any, ids: Iterator[int], chosen: list[int], config: Any) -> Any:
    if hasattr(value, "to_dict"):
        return shrink(value, ids)
    if name.endswith(("token_id", "token_index")) and value is not None:
        return next((n for word, n in SPECIAL.items() if name.startswith(word)), None) or next(ids)
    if value is None:
        return MISSING.get(name)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return small(name, value)
    if name == "rope_parameters":
        return rope(value)
    if isinstance(value, (list, tuple)) and chosen and len(value) == config.num_hidden_layers:
        return [small(name, v) if type(v) is int else v for v in (value[n] for n in chosen)]
    return value


def rope(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: [2, 3, 3] if k == "mrope_section" else rope(v) for k, v in value.items()}


def layer_choice(config: Any) -> list[int]:
    """Layers of the default configuration to keep: all kinds in turn."""
    count = read(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        return []
    lists = [v for _, v in sorted(vars(config).items()) if isinstance(v, (list, tuple)) and len(v) == count]
    rows = [repr(row) for row in zip(*lists, strict=True)] or [""] * count
    order = [rows.index(kind) for kind in dict.fromkeys(rows)]
    return [order[n % len(order)] for n in range(LAYERS)]


def prompt(model: PreTrainedModel, batch: int = 1, length: int = 63, seed: int = 0) -> Tensor:
    """Random token ids [batch, length] without special ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_ID, VOCAB, (batch, length), generator=generator)
