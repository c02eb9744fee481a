"""How configurations are made small: rules by attribute name, and the few types that need a word of their own."""

from __future__ import annotations

import re
from typing import Any

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 4, 2, 16, 128
HIDDEN = HEADS * HEAD_DIM
WINDOW, TOP, POSITIONS = 16, 12, 256

# First match wins. A list is what the attribute becomes, a number what it becomes at most.
RULES: list[tuple[str, Any]] = [
    (r".*(vocab_size|unpadded_vocab|group_vocab).*", [VOCAB]),
    (r"qk_head_dim", [2 * HEAD_DIM]),
    (r".*(hidden_size|_hidden_dim|projection_dim|output_dim)|hidden_size_global", [HIDDEN]),
    (r"d_model|n_embd|dim_model|(embed|emb)_dim", [HIDDEN]),
    (r"embedding_size|word_embed_proj_dim|.*_(in|out)_dim|out_hidden_size|text_hidden_size", [HIDDEN]),
    (r"(.*_)?num_(hidden_)?layers|n_layers?|(decoder|encoder)_layers|layers|depth", [LAYERS]),
    (r"(.*num_)?(key_value|kv)_heads|kv_n_heads", [KV_HEADS]),
    (r"(.*_)?(num_)?(attention_)?heads|n_heads?", [HEADS]),
    (r"(.*_)?head_dim|d_kv|dim_head|kv_channels", [HEAD_DIM]),
    (r"sliding_window(_size)?|attention_(chunk|window)_size|local_attention(_window_len)?", [WINDOW]),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length", [POSITIONS]),
    (r"(moe|shared|expert).*(intermediate|ffn|hidden).*size", 32),
    (r".*(intermediate|ffn|mlp).*(size|dim)|d_ff|dff|dim_ff|d_inner", 96),
    (r".*num.*experts|n_routed_experts|zero_expert_num", 4),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k|topk", 2),
    (r"index_topk|.*_top_?k", TOP),
    (r"n_group|num_expert_group", 2),
    (r"topk_group|first_k_dense_replace|num_nextn_predict_layers", 1),
    (r".*lora_rank", 32),
    (r"rotary_dim", 8),
    (r".*chunk_size|block_size", 16),
    (r"(mamba_)?(d_state|state_size)|.*state_size", 16),
]


def small(name: str, value: int) -> int:
    """What an integer attribute of that name becomes."""
    for pattern, size in RULES:
        if value and re.fullmatch(pattern, name):
            return size[0] if isinstance(size, list) else min(size, value)
    return value


MIXED = ["linear_attention", "full_attention"] * 2
ALTERNATING = ["sliding_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
HALF_MROPE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
# By model_type of the configuration (by its class where it has none), also where it is part of another.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 24, "audio_token_offset": 32},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "cohere_compass_text": {
        "layer_types": ALTERNATING,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_head_dim": 2 * HEAD_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "gemma3n_text": {"vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 32},
    "glm46v_text": HALF_MROPE,
    "glm4v_moe_text": HALF_MROPE,
    "glm4v_text": HALF_MROPE,
    "glm5_next_text": {"index_kpool": 4},
    "glm_ocr_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": MIXED},
    "hunyuan_vl_text": MROPE,
    "hrm_text": {"num_hidden_layers": 2},
    "inkling2_loop_text": {"loop_layer_index_start": 2, "loop_layer_index_end": 4, "n_layers_per_attn_res_block": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": ALTERNATING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ALTERNATING},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 8,
        "index_topk_blocks": 1,
    },
    "molmo2_adapter": {"vision_feature_layer": [3, 1]},
    "moshi": {"sliding_window": POSITIONS},  # its cache drops what lies before the window, its masks do not
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {"n_groups": 2},
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {"axial_pos_embds": False},
    "step3p5": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN, "codebook_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "layers_block_type": None,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
    },
    "zamba2": {"use_mem_rope": True},
}
# Types that are no language models by themselves, and why.
ELSEWHERE = {
    "gemma4_assistant": "a drafting head that reads the keys of its target model",
    "gemma4_unified_assistant": "a drafting head that reads the keys of its target model",
}
