"""Gate weights that checkpoints keep in a widened query projection, taken apart."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config.hub import download
from ...config.patch_config import PatchConfig
from ...config.patch_store import load_tensors
from ...config.registry import make_config
from ...errors import ConfigError, reason
from ...files.json_text import read_json
from ...values import shown

LAYOUTS = ("kv-groups", "heads")
FILES = ["*.json", "*.safetensors"]
_QUERY = re.compile(r"(.*\blayers\.(\d+)\..*\bq_proj)\.(weight|bias)")


def split_query(t: Tensor, heads: int, kv_heads: int, head_dim: int, layout: str) -> tuple[Tensor, Tensor | None]:
    """Query rows `[Hq D, ...]` and gate rows `[Hq or Hq D, ...]` of a q_proj weight or bias `[out, ...]`.

    "kv-groups": per key-value head all its queries, then all its gates (the paper's repository, arXiv 2505.06708);
    "heads": per query head its query, then its gate (Qwen3-Next). Gates are None for a plain projection.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"gated: layout={layout!r} is not one of {', '.join(LAYOUTS)}.")
    extra = len(t) - heads * head_dim
    if extra == 0:
        return t, None
    if extra not in (heads, heads * head_dim):
        raise ConfigError(
            f"gated: a query projection of {len(t)} rows is neither {heads} heads of {head_dim} nor those with one "
            f"gate per head or per channel."
        )
    parts = kv_heads if layout == "kv-groups" else heads
    block = t.reshape(parts, -1, *t.shape[1:])
    queries = heads * head_dim // parts
    return block[:, :queries].flatten(0, 1).contiguous(), block[:, queries:].flatten(0, 1).contiguous()


def load_gates(
    state_dict: Mapping[str, Tensor], config: Any, layout: str = "kv-groups"
) -> tuple[dict[str, Tensor], PatchConfig]:
    """A gated checkpoint as weights of the plain architecture, and the patch that gates it.

    `config` is the model's config (heads, key-value heads, head size). Raises ConfigError for a checkpoint without
    gates or with another shape.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    plain: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        match = _QUERY.fullmatch(key)
        plain[key], gate = split_query(value, heads, kv_heads, head_dim, layout) if match else (value, None)
        if match and gate is not None:
            gates[f"0.layers.{match[2]}.{match[3]}"] = gate
    if not gates:
        raise ConfigError("gated: no query projection of this checkpoint carries gates; load it as it is.")
    return plain, PatchConfig([make_config("gated", {"form": "sigmoid"})], None, gates)


def load_gated_model(name_or_path: str, *, layout: str = "kv-groups", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A checkpoint of the paper's repository on the plain Transformers architecture, patched with its gates.

    Nothing of the checkpoint's own code is run. Qwen3 serves configs with query and key norm, Llama those without.
    Raises ConfigError.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from ...api import patch_model

    folder = Path(name_or_path) if Path(name_or_path).is_dir() else download(name_or_path, None, FILES)
    data = read_json(folder / "config.json")
    if not isinstance(data, dict):
        raise ConfigError(f"gated: {folder / 'config.json'} is not the config of a model.")
    normed = data.get("use_qk_norm", True)
    data = {k: v for k, v in data.items() if k not in ("auto_map", "architectures", "model_type", "use_qk_norm")}
    data.setdefault("attention_bias", bool(data.pop("qkv_bias", False)))
    weights = _weights(folder)
    try:
        config: Any = (Qwen3Config if normed else LlamaConfig)(**data)
        plain, patch = load_gates(weights, config, layout)
        model: Any = (Qwen3ForCausalLM if normed else LlamaForCausalLM)(config)
        missing, unexpected = model.load_state_dict(plain, strict=False)
    except ConfigError:
        raise
    except Exception as error:  # what Transformers and PyTorch make of a config or of shapes that do not fit
        raise ConfigError(f"gated: {shown(name_or_path)} cannot be loaded ({reason(error)}).") from error
    odd = [k for k in missing if not (k == "lm_head.weight" and config.tie_word_embeddings)] + [
        k for k in unexpected if not k.endswith("inv_freq")
    ]
    if odd:
        raise ConfigError(f"gated: {shown(name_or_path)} does not fit {type(model).__name__}: {odd[0]}.")
    model.tie_weights()
    return patch_model(model.to(dtype).eval(), patch)


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"gated: {folder} holds no safetensors file.")
    return {k: t for file in files for k, t in load_tensors(file).items()}
