"""Tiny random models of many architectures, built from configurations without any download."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from zoo_model import FIRST_PLAIN_ID, IMAGE, PAD, TOKENS, VIDEO, VISION_END, VISION_START, VOCAB, WINDOW, TinyModel

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    **TOKENS,
}
HEAD: dict[str, Any] = {"head_dim": 16}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def _text(name: str, prefix: str, config: dict[str, Any], **facts: Any) -> TinyModel:
    """A causal language model whose classes share one prefix, on top of the base configuration."""
    head = facts.pop("head", "ForCausalLM")
    base = facts.pop("base", BASE)
    config_cls = facts.pop("config_cls", f"{prefix}Config")
    return TinyModel(name, f"{prefix}{head}", config_cls, {**base, **config}, **facts)


def _vision(name: str, prefix: str, config: dict[str, Any], **facts: Any) -> TinyModel:
    """A vision-language model that also runs on text alone."""
    config = {"image_token_id": IMAGE, "tie_word_embeddings": False, **TOKENS, **config}
    head = f"{prefix}ForConditionalGeneration"
    return TinyModel(name, head, f"{prefix}Config", config, vision=True, **facts)


GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 1024,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": False,
    **TOKENS,
}
GPTJ = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 1024,
    "rotary_dim": 8,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    **TOKENS,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_mtp_layers": 0,
}
FALCON_H1 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
QWEN3_NEXT = {
    **MOE,
    "rms_norm_eps": 1e-4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "shared_expert_intermediate_size": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GEMMA = {**HEAD, "num_hidden_layers": 4, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN2_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "mlp_ratio": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _plain_models() -> list[TinyModel]:
    """Models with full softmax attention in every layer."""
    gpt2 = {"head": "LMHeadModel", "base": {}, "learned_positions": True}
    mqa8 = {**HEAD, "num_attention_heads": 8, "num_key_value_heads": 1}
    early = {"base": {}, "gqa": 1, "since": (5, 24)}
    return [
        _text("llama", "Llama", {**HEAD, "num_attention_heads": 8}, gqa=4),
        _text("llama-mha", "Llama", {**HEAD, "num_key_value_heads": 4}, gqa=1),
        _text("llama-mqa8", "Llama", mqa8, gqa=8),
        _text("qwen2", "Qwen2", {}),
        _text("qwen3", "Qwen3", HEAD, notes="RMS norm on each query and key head"),
        _text("qwen3_moe", "Qwen3Moe", {**HEAD, **MOE}, notes="4 experts, top 2"),
        _text("mistral-full", "Mistral", {**HEAD, "sliding_window": None}),
        _text("phi3", "Phi3", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, notes="fused qkv_proj"),
        _text("gpt2", "GPT2", GPT2, gqa=1, notes="Conv1D projections", **gpt2),
        _text("gpt_neox", "GPTNeoX", {"rotary_pct": 0.5}, gqa=1, notes="fused query_key_value"),
        _text("deepseek_v3", "DeepseekV3", DEEPSEEK, gqa=1, asymmetric=True, notes="latent cache; MoE"),
        _text("granite", "Granite", {"attention_multiplier": 0.25, "residual_multiplier": 0.7}),
        _text("olmo2", "Olmo2", {}, notes="query and key norm over all heads"),
        _text("smollm3", "SmolLM3", {"no_rope_layers": [1, 1, 0]}, notes="no rotary in layer 2"),
        _text("gptj", "GPTJ", GPTJ, notes="parallel residual; partial interleaved rotary", **early),
        _text("codegen", "CodeGen", GPTJ, notes="one fused qkv projection in four parts", **early),
    ]


def _sliding_models() -> list[TinyModel]:
    """Models with sliding-window layers."""
    alternating = {"num_hidden_layers": 4, "layer_types": ALTERNATING, "sliding_window": WINDOW}
    oss = {**HEAD, **alternating, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE}
    gemma = {**GEMMA, "layer_types": ALTERNATING}
    mixed = {"sliding": True, "full_layers": [1, 3]}
    every = {"sliding": True, "all_sliding": True, "full_layers": []}
    return [
        _text("mistral", "Mistral", {**HEAD, "sliding_window": WINDOW}, **every),
        _text("gemma2", "Gemma2", {**gemma, "attn_logit_softcapping": 5.0}, softcap=True, **mixed),
        _text("gemma3_text", "Gemma3", gemma, config_cls="Gemma3TextConfig", **mixed),
        _text("gpt_oss", "GptOss", oss, sinks=True, notes="MoE", **mixed),
        _text("cohere2", "Cohere2", {**alternating, "logit_scale": 1.0}, **mixed),
    ]


def _hybrid_models() -> list[TinyModel]:
    """Models that mix softmax attention with recurrent layers."""
    return [
        _text("falcon_h1", "FalconH1", FALCON_H1, hybrid=True, since=(5, 3)),
        _text("qwen3_next", "Qwen3Next", {**HEAD, **QWEN3_NEXT}, hybrid=True, full_layers=[1, 3]),
    ]


def _vision_models() -> list[TinyModel]:
    """Vision-language models."""
    llava = {
        "text_config": {"model_type": "llama", **BASE, **HEAD},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **SIGLIP},
    }
    gemma = {
        "text_config": {"model_type": "gemma3_text", **BASE, **GEMMA, "layer_types": ALTERNATING},
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        "mm_tokens_per_image": 4,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    }
    qwen = {
        "text_config": {"model_type": "qwen2_vl_text", **BASE, "rope_parameters": MROPE},
        "vision_config": QWEN2_VISION,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    return [
        _vision("llava", "Llava", llava, notes="CLIP tower, Llama text"),
        _vision("gemma3", "Gemma3", gemma, sliding=True, full_layers=[1, 3], notes="SigLIP tower"),
        _vision("qwen2_vl", "Qwen2VL", qwen, notes="multimodal rotary"),
    ]


def _refused_models() -> list[TinyModel]:
    """Models whose attention does not go through the attention interface."""
    bloom = {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, **TOKENS}
    mamba = {"vocab_size": VOCAB, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, **TOKENS}
    falcon = {"new_decoder_architecture": False, "multi_query": True, "alibi": False, "num_hidden_layers": 2}
    return [
        _text("bloom", "Bloom", bloom, base={}, gqa=1, full_layers=[0, 1], notes="ALiBi"),
        _text("falcon", "Falcon", falcon, gqa=4, full_layers=[0, 1]),
        _text("gptj", "GPTJ", GPTJ, base={}, gqa=1),
        _text("mamba", "Mamba", mamba, base={}, gqa=1, full_layers=[], notes="no attention"),
    ]


RELEASE = tuple(int(n) for n in transformers.__version__.split(".")[:2])
SUPPORTED: dict[str, TinyModel] = {
    tiny.name: tiny
    for tiny in _plain_models() + _sliding_models() + _hybrid_models() + _vision_models()
    if tiny.since <= RELEASE
}
# Same attention code as another of the list, by which it is run with all methods: these run a sample, all if slow.
NEAR_TWINS: dict[str, tuple[str, str]] = {
    "llama-mha": ("llama", "Llama's attention with a key head per query head, as gpt2 has"),
    "qwen2": ("llama", "Llama's attention with a bias on the projections"),
    "qwen3_moe": ("qwen3", "Qwen3's attention; the experts come after it"),
    "mistral-full": ("llama", "Llama's attention once no window is set"),
    "granite": ("llama", "Llama's attention with a scale of its own, as gemma2 has"),
    "olmo2": ("qwen3", "norms on queries and keys before RoPE, over all heads instead of each"),
    "smollm3": ("llama", "Llama's attention, in one layer without RoPE"),
    "codegen": ("gptj", "GPT-J's attention behind one fused projection"),
    "cohere2": ("gemma3_text", "sliding and full layers in turn, without norms on queries and keys"),
    "llava": ("llama", "Llama as the text decoder"),
    "gemma3": ("gemma3_text", "the same text decoder"),
}
REFUSED: dict[str, TinyModel] = {tiny.name: tiny for tiny in _refused_models() if tiny.name not in SUPPORTED}


def prompt(model: PreTrainedModel, batch: int = 1, length: int = 63, seed: int = 0) -> Tensor:
    """Random token ids [batch, length] without special ids."""
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(FIRST_PLAIN_ID, vocab, (batch, length), generator=generator)


def cache_name(model: PreTrainedModel) -> str:
    """What the installed release calls the cache, in a call of the model and in its output."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _padded(ids: Tensor, lengths: Sequence[int], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Keep the first lengths[i] tokens of row i, at the left or right end of the longest row."""
    width = max(lengths)
    out = ids.new_full((len(lengths), width), pad)
    mask = torch.zeros_like(out)
    for row, count in enumerate(lengths):
        start = width - count if left else 0
        out[row, start : start + count] = ids[row, :count]
        mask[row, start : start + count] = 1
    return out, mask


def left_pad(ids: Tensor, lengths: Sequence[int], pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask with the first lengths[i] tokens of row i at its right end."""
    return _padded(ids, lengths, pad, left=True)


def right_pad(ids: Tensor, lengths: Sequence[int], pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask with the first lengths[i] tokens of row i at its left end."""
    return _padded(ids, lengths, pad, left=False)


def positions(mask: Tensor) -> Tensor:
    """Position ids that count the real tokens of each row from zero."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
