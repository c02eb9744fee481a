"""CUDA's own operations that a CPU lacks, computed on CPU tensors: their conventions, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .log import log

HALF = (torch.bfloat16, torch.float16)
FLASH, EFFICIENT, CUDNN = 1, 2, 3
PREFERRED = [FLASH]  # the card's choice for what it can run; a test may change it


def choice(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> int:  # fmt: skip
    """`_fused_sdp_choice`: the preferred kernel where it can run these tensors."""
    able = q.dtype in HALF and mask is None and q.shape[3] == k.shape[3] == v.shape[3] <= 256
    able = able and (not causal or q.shape[2] == k.shape[2]) and (enable_gqa or q.shape[1] == k.shape[1])
    return PREFERRED[0] if able else EFFICIENT


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """`_scaled_dot_product_flash_attention`: fewer key heads than query heads will do."""
    _half(q, k, v, causal)
    out, lse = _attention(q, k, v, causal, scale)
    return (
        out,
        lse,
        None,
        None,
        q.shape[2],
        k.shape[2],
        torch.zeros(2, dtype=torch.long),
        torch.zeros(()),
        torch.zeros(0),
    )


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, compute_lse: bool, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """`_scaled_dot_product_cudnn_attention`: its lse has a dimension more."""
    _half(q, k, v, causal)
    if bias is not None or not compute_lse:
        log.now.fault("cuDNN is asked for its lse, without a mask")
    for t in (k, v):
        if (t.shape[0] > 1 and t.stride(0) < t.shape[2] * t.stride(2)) or (t.shape[1] > 1 and t.stride(1) == 0):
            log.now.fault(f"cuDNN is given overlapping rows: {tuple(t.shape)}, strides {t.stride()}")
    out, lse = _attention(q, k, v, causal, scale)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], torch.zeros(()), torch.zeros(()), torch.zeros(0)


def efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    compute_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`_scaled_dot_product_efficient_attention`: lse filled up to 32 rows, NaN where a row sees nothing."""
    _check(q, k, v, bias, causal)
    mask = None if bias is None else bias.expand(q.shape[0], q.shape[1], -1, -1)
    out, lse = _attention(q, k, v, causal, scale, mask)
    out, lse = out.clone(), lse.float()
    if bias is not None:
        gone = bias.isneginf().all(-1).expand(lse.shape)
        out[gone], lse[gone] = float("nan"), float("nan")
    wide = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), float("nan"))
    wide[..., : lse.shape[2]] = lse
    return out, wide, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)


def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """`bmm`, which on CUDA returns products of half precision in float32 as well."""
    if out_dtype is None:
        return torch.ops.aten.bmm(a, b)
    if a.dtype not in HALF or a.dtype != b.dtype or out_dtype != torch.float32:
        log.now.fault(f"bmm of {a.dtype} and {b.dtype} to {out_dtype}")
    return torch.ops.aten.bmm(a.float(), b.float())


KERNELS: dict[str, Callable[..., Any]] = {
    "_fused_sdp_choice": choice, "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_cudnn_attention": cudnn, "_scaled_dot_product_efficient_attention": efficient, "bmm": bmm,
}  # fmt: skip


def _attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By the CPU's kernel, which wants as many key heads as query heads and one width."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scale, dv, wide = scale or q.shape[3] ** -0.5, v.shape[3], max(q.shape[3], v.shape[3])
    q, k, v = (F.pad(t, (0, wide - t.shape[3])) for t in (q, k, v))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out[..., :dv], lse


def _half(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    if (
        q.dtype not in HALF
        or q.dtype != k.dtype
        or q.shape[3] % 8
        or not q.shape[3] == k.shape[3] == v.shape[3] <= 256
    ):
        log.now.fault(f"{q.dtype} {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} where half precision is meant")
    if q.shape[1] % k.shape[1] or any(t.stride(3) != 1 for t in (q, k, v)):
        log.now.fault(f"heads or strides: {tuple(q.shape)} {tuple(k.shape)}")
    if causal and q.shape[2] != k.shape[2]:
        log.now.fault("causal with other lengths")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool) -> None:
    now, per = log.now, 16 // q.element_size()
    if bias is not None and bias.dtype != q.dtype:
        now.fault(f"bias of {bias.dtype} for queries of {q.dtype}")
    if bias is not None:
        strides = [s for n, s in zip(bias.shape[:3], bias.stride()[:3], strict=True) if n > 1]
        if any(s % per for s in strides) or bias.stride(3) != 1:
            now.fault(f"bias strides {bias.stride()} not aligned")
    if q.shape[1] != k.shape[1] or q.shape[-1] != k.shape[-1]:
        now.fault(f"heads or widths differ: {tuple(q.shape)} {tuple(k.shape)}")
    if q.shape[-1] % per or v.shape[-1] % per or any(t.stride(3) != 1 for t in (q, k, v)):
        now.fault(f"heads of {q.shape[-1]} and {v.shape[-1]} are not aligned")
    if max(q.shape[0], q.shape[1]) > 65535:
        now.fault(f"grid of {tuple(q.shape[:2])}")
    if causal and q.shape[2] != k.shape[2]:
        now.fault("causal with other lengths: the upper left corner is meant")
