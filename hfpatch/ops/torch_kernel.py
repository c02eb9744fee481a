"""The dense inner step of the torch executor: attention of blocks of queries over blocks of keys, with its lse."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hfpatch.core.logits import capped
from hfpatch.ops import torch_cuda
from hfpatch.ops.call import Problem
from hfpatch.ops.merge import Part, lse_of

MATH_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Kernel:
    """Attention of `q [N, H, R, G, D]` over `k [N, H, C, D]`, `v [N, H, C, Dv]`: a part `[N, H, R, G, ...]`.

    `grouped`: whether the fused step takes fewer key heads than query heads. `product`: what multiplies the matrices
    where no step is fused.
    """

    scale: float
    softcap: float | None
    fused: Callable[..., Part] | None
    grouped: bool = False
    product: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of(cls, problem: Problem) -> "Kernel":
        """The fastest step that can serve the problem: a fused one, or plain matrix products."""
        device = problem.q.device.type
        odd = problem.q.dtype == torch.float64 if device == "cuda" else problem.v.shape[-1] != problem.q.shape[-1]
        plain = problem.softcap is not None or problem.needs_grad or odd
        fused = None if plain else _FUSED.get(device)
        half = device == "cuda" and problem.q.dtype in torch_cuda.HALF and not problem.needs_grad
        return cls(problem.scale, problem.softcap, fused, device == "cuda", torch_cuda.product if half else None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Part:
        """Every query of a block sees every key, but for the additive `mask [N|1, H|1, R|1, G|1, C]`."""
        n, h, r, g, d = q.shape
        c = k.shape[2]
        if c == 0:
            return q.new_zeros(n, h, r, g, v.shape[-1]), lse_of_nothing(q)
        if mask is not None:
            m = mask.expand(*mask.shape[:2], r, g, c)
            mask = m[:, :, 0, :1] if m.stride(2) == m.stride(3) == 0 else m.reshape(*m.shape[:2], r * g, c)
        step = self.fused or partial(_math, softcap=self.softcap, product=self.product)
        o, lse = step(q.reshape(n, h, r * g, d), k, v, mask, scale=self.scale)
        if mask is not None and self.fused is not None:
            o, lse = _blank(o, lse, mask)
        return o.unflatten(2, (r, g)), lse.unflatten(2, (r, g))

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Query n sees keys 0..n of its own block: `q [N, H, L, D]`; a fused step only."""
        if self.fused is None:
            raise TypeError("causal blocks need a fused step")
        return self.fused(q, k, v, None, scale=self.scale, causal=True)


def lse_of_nothing(q: Tensor) -> Tensor:
    """The lse `[...]` of queries `q [..., D]` that see no key."""
    return torch.full(q.shape[:-1], -torch.inf, device=q.device)


def _blank(o: Tensor, lse: Tensor, mask: Tensor) -> Part:
    """Rows without a key: the fused steps return an arbitrary lse for them."""
    if lse.device.type == "cpu" and not bool(((lse == 0) | ~lse.isfinite()).any()):
        return o, lse
    empty = mask.isneginf().all(-1)
    return o.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, causal: bool = False) -> Part:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if mask is not None:
        mask = mask.expand(*q.shape[:3], -1)
    if mask is not None and q.dtype == torch.float64:
        mask = mask.double()  # the kernel reads a float32 mask as if it were float64
    o, lse = flash(_dense(q), _dense(k), _dense(v), 0.0, causal, attn_mask=mask, scale=scale)
    return o, lse.float()


_FUSED: dict[str, Callable[..., Part]] = {"cpu": _cpu, "cuda": torch_cuda.attention}


def _math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    product: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Part:
    """Plain matrix products with float32 accumulation, some rows at a time; `product` takes them in q's dtype."""
    n, h, r, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    if product is None:
        k, v = k.to(acc), v.to(acc)
    step = max(1, MATH_ELEMENTS // max(1, n * h * k.shape[2]))
    outs, lses = [], []
    for at in range(0, r, step):
        rows = q[:, :, at : at + step]
        logits = (rows.to(acc) * scale) @ k.mT if product is None else product(rows, k.mT) * scale
        logits = capped(logits, softcap)
        if mask is not None:
            logits = logits + (mask if mask.shape[2] == 1 else mask[:, :, at : at + step])
        top = logits.detach().amax(-1, keepdim=True)
        top = top.masked_fill_(top.isneginf(), 0.0)
        power = torch.exp(logits - top)
        total = power.sum(-1)
        out = power @ v if product is None else product(power.to(v.dtype), v)
        outs.append(out / total.clamp_min(torch.finfo(acc).tiny)[..., None])
        lses.append(lse_of(total, top[..., 0]).float())
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
