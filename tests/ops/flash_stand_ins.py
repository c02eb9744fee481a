"""flash-attn 2, 3 and 4 in plain PyTorch: their signatures, layouts and conventions as their sources have them."""

from __future__ import annotations

from types import ModuleType

import torch


def attention(q, k, v, scale, left, right, cap):
    """`out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]`; query i sees keys `i + Lk - Lq - left .. i + Lk - Lq + right`."""
    assert q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3]
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    lq, lk, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, 2).double() for t in (k, v))
    x = torch.einsum("bihd,bjhd->bhij", q.double(), k) * scale
    if cap:
        x = cap * torch.tanh(x / cap)
    away = torch.arange(lk) - torch.arange(lq)[:, None] - (lk - lq)
    if left >= 0:
        x = x.masked_fill(away < -left, -torch.inf)
    if right >= 0:
        x = x.masked_fill(away > right, -torch.inf)
    lse = x.logsumexp(-1)
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(x - lse[..., None]).nan_to_num(0.0), v)
    return out.to(q.dtype), lse.float()


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn.flash_attn_func` of 2.8.4."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and dropout_p == 0.0 and alibi_slopes is None
    left, right = window_size
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = attention(q, k, v, scale, left, 0 if causal else right, softcap)
    return (out, lse, torch.empty(0)) if return_attn_probs else out


def flash_attn_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_interface.flash_attn_func` of 3.0.0."""
    assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0 and max(q.shape[-1], v.shape[-1]) <= 256
    assert qv is q_descale is k_descale is v_descale is None and attention_chunk == 0 and num_splits <= 128
    left, right = window_size
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = attention(q, k, v, scale, left, 0 if causal else right, softcap)
    return (out, lse) if return_attn_probs else out


def flash_attn_4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False,
):  # fmt: skip
    """`flash_attn.cute.flash_attn_func` of 4.0.0.beta; splits of the keys are an error on Hopper."""
    assert qv is gather_kv_indices is learnable_sink is score_mod is mask_mod is block_sparse_tensors is None
    assert num_splits == 1 and q.shape[-1] % 8 == v.shape[-1] % 8 == 0
    left, right = window_size
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = attention(q, k, v, scale, -1 if left is None else left, -1 if right is None else right, softcap)
    return out, lse if return_lse else None


STAND_INS = {
    "flash_attn": ("flash-attn 2", flash_attn_2), "flash_attn_interface": ("flash-attn 3", flash_attn_3),
    "flash_attn.cute": ("flash-attn 4", flash_attn_4),
}  # fmt: skip


def module(name):
    """The library as a module to import."""
    made = ModuleType(name)
    if name == "flash_attn.cute":
        made.__spec__ = None
    made.flash_attn_func = STAND_INS[name][1]
    return made
