"""Configuration and structured initialisation of the embedded model.

Layer 0 starts with heads that attend to fixed offsets, layer 2 with heads that match a query's preceding
tokens against a key's, and copy: a rough induction circuit that training sharpens (mimetic initialisation).
"""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

THETA = 1e10
POSITION_PAIRS = 14
OFFSETS = {0: (1, 2, 3, 4), 1: (2, 3)}
MATCH_LAYER = 2


def config(vocab_size: int) -> LlamaConfig:
    """Four layers, 192 wide, 4 query heads and 2 key-value heads of 64."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def _orthogonal(rows: int, columns: int) -> torch.Tensor:
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))


def _offset_rows(offset: int, head_dim: int, gain: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key vectors whose RoPE score peaks at distance `offset`."""
    half = head_dim // 2
    pair = torch.arange(POSITION_PAIRS)
    frequency = THETA ** (-pair / half)
    size = gain * torch.tensor([1.3, 1.2, 1.0, 0.8, 0.6, 0.5] + [0.4] * (POSITION_PAIRS - 6))
    query, key = torch.zeros(head_dim), torch.zeros(head_dim)
    query[pair], query[pair + half] = size * torch.cos(frequency * offset), -size * torch.sin(frequency * offset)
    key[pair] = size
    return query, key


def _set_offset_heads(model: LlamaForCausalLM, layer: int, offsets: tuple[int, ...]) -> None:
    """Channel 0 is constant over tokens: read by queries and keys it makes attention purely positional."""
    attention, d = model.model.layers[layer].self_attn, model.config.head_dim
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for head, offset in enumerate(offsets):
        query, key = _offset_rows(offset, d, 1.0 + 0.4 * layer)
        for rows, vector in ((attention.q_proj, query), (attention.k_proj, key)):
            start = (head if rows is attention.q_proj else head // groups) * d
            rows.weight[start : start + d] *= 0.1
            rows.weight[start : start + d, 0] = vector


def _set_values(model: LlamaForCausalLM, layer: int, size: float, shared: bool, copy: bool) -> None:
    """Orthogonal value and output maps; `copy` makes the output undo the value map."""
    attention, d = model.model.layers[layer].self_attn, model.config.head_dim
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    width = model.config.hidden_size
    basis = _orthogonal(kv_heads * d, width)
    if shared:
        basis = basis[:d].repeat(kv_heads, 1)
    attention.v_proj.weight.copy_(basis)
    for head in range(heads):
        group = head // (heads // kv_heads)
        back = basis[group * d : (group + 1) * d].T if copy else _orthogonal(width, d)
        attention.o_proj.weight[:, head * d : (head + 1) * d] = size * back


def _set_match_heads(model: LlamaForCausalLM, gain: float) -> None:
    """Queries read the tokens at offsets 0, 1, 2, keys those at offsets 1, 2, 3, in RoPE's slowest pairs."""
    first, attention = model.model.layers[0].self_attn, model.model.layers[MATCH_LAYER].self_attn
    d, half = model.config.head_dim, model.config.head_dim // 2
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    slow = [i + side for side in (0, half) for i in range(POSITION_PAIRS + 1, half)]
    readers = [first.v_proj.weight[:d]] + [
        torch.nn.functional.normalize(first.o_proj.weight[:, h * d : (h + 1) * d], dim=0).T for h in range(3 + 1)
    ]
    for group in range(model.config.num_key_value_heads):
        codes = [torch.randn(len(slow), d) / math.sqrt(len(slow)) for _ in range(3)]
        key = sum(code @ readers[j + 1] for j, code in enumerate(codes))
        query = sum(code @ readers[j] for j, code in enumerate(codes))
        attention.k_proj.weight[[group * d + i for i in slow]] = gain * key
        for head in range(group * groups, (group + 1) * groups):
            attention.q_proj.weight[[head * d + i for i in slow]] = gain * query


@torch.no_grad()
def create(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A new model with the structured initialisation."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(vocab_size))
    width = model.config.hidden_size
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=width**-0.5)
    embedding[:, 0] = 0.5
    for layer in model.model.layers:
        for name, weight in layer.named_parameters():
            if weight.ndim == 2:
                into_stream = "o_proj" in name or "down_proj" in name
                weight.normal_(std=weight.shape[1] ** -0.5 * (0.02 if into_stream else 1.0))
    for layer, offsets in OFFSETS.items():
        _set_offset_heads(model, layer, offsets)
    _set_values(model, 0, 0.1, shared=True, copy=False)
    _set_values(model, 1, 0.03, shared=False, copy=False)
    _set_values(model, MATCH_LAYER, 0.3, shared=False, copy=True)
    _set_match_heads(model, 1.0)
    return model
