"""Fused attention with its log-sum-exp on CUDA: flash, cuDNN or memory-efficient, as PyTorch itself would choose.

The operations are those that `scaled_dot_product_attention` ends in, which keeps the lse to itself. Half precision
without a mask goes to flash or cuDNN, which split the keys of few queries over processors and take fewer key heads
than query heads; masks, float32 and values of another width than keys go to the memory-efficient kernel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hfpatch.ops.merge import Part

FLASH, EFFICIENT, CUDNN = 1, 2, 3  # values of torch.nn.attention.SDPBackend
HALF = (torch.bfloat16, torch.float16)
FEW = 16  # queries; cuDNN plans anew for every length, which decode steps change
WIDTH, WIDEST = 8, 256  # heads are multiples of the first, and up to the second with flash
ALIGNED = 16  # mask rows are multiples of it


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, causal: bool = False) -> Part:
    """`out [N, H, R, Dv]`, `lse [N, H, R]` of `q [N, H, R, D]`, `k [N, Hkv, C, D]` under `mask [N|1, H|1, R|1, C]`.

    H is a multiple of Hkv; causal: R = C, the diagonal from corner to corner.
    """
    dv = v.shape[-1]
    q, k, v = (_padded(t) for t in (q, k, v))
    backend = EFFICIENT if mask is not None else chosen(q, k, v, scale, causal)
    if backend == FLASH:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    elif backend == CUDNN:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        o, lse = cudnn(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    else:
        o, lse = _efficient(q, k, v, mask, scale, causal)
    return o[..., :dv], lse.reshape(q.shape[:3])


def chosen(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> int:
    """The backend for tensors without a mask: PyTorch's choice, but flash for few queries and overlapping views."""
    if q.dtype not in HALF or q.shape[-1] != v.shape[-1]:
        return EFFICIENT
    if torch.compiler.is_compiling():  # which wants no number from an operation
        return FLASH if q.shape[-1] <= WIDEST else EFFICIENT
    shared = k.shape[1] != q.shape[1]
    found = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=shared)
    unusual = q.shape[2] <= FEW or not all(map(_apart, (k, v)))
    return FLASH if found == CUDNN and unusual and torch.backends.cuda.is_flash_attention_available() else found


def _apart(t: Tensor) -> bool:
    """Whether rows of the batch and heads of `t [N, H, C, D]` share no memory, as all others give them to cuDNN."""
    return (t.shape[0] == 1 or t.stride(0) >= t.shape[2] * t.stride(2)) and (t.shape[1] == 1 or t.stride(1) > 0)


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Part:
    """By the memory-efficient kernel; heads that share keys become a batch of their own, so that none is copied."""
    (n, h, r, d), shared = q.shape, k.shape[1]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    if h != shared:
        q = q.reshape(n * shared, h // shared, r, d)
        k, v = (t.reshape(n * shared, 1, *t.shape[2:]).expand(-1, h // shared, -1, -1) for t in (k, v))
    aligned = None if mask is None else aligned_mask(mask, q.dtype).expand(*q.shape[:3], -1)
    o, lse = efficient(q, k, v, aligned, True, 0.0, causal, scale=scale)[:2]
    return o.reshape(n, h, r, -1), lse[..., : q.shape[2]].reshape(n, h, r)


def aligned_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask `[N|1, H|1, R|1, C]` in rows as the kernel wants them, before it is expanded."""
    c = mask.shape[-1]
    if mask.dtype == dtype and c % ALIGNED == 0 and mask.is_contiguous():
        return mask
    room = mask.new_empty((*mask.shape[:3], -(-c // ALIGNED) * ALIGNED), dtype=dtype)[..., :c]
    return room.copy_(mask)


def _padded(t: Tensor) -> Tensor:
    """`t [..., D]` with zeros up to a width that the kernels take, its last dimension dense."""
    short = -t.shape[-1] % WIDTH
    return F.pad(t, (0, short)) if short else t if t.stride(-1) == 1 else t.contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a [N, H, R, D] @ b [N, H, D, C]` of half precision on CUDA, added up and returned in float32."""
    if not hasattr(torch.ops.aten.bmm, "dtype"):
        return a.float() @ b.float()
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
