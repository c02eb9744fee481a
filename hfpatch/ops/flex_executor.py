"""The flex executor: PyTorch's compiled `flex_attention` over block lists and windows, on a GPU.

One compiled function serves all lengths: sizes are dynamic, and what changes from call to call (offset, sink, window,
bias) reaches the compiled code as tensors.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hfpatch.core.selection import BlockMap, Causal, Layout, SinkWindow
from hfpatch.ops.call import Problem
from hfpatch.ops.parts import leaves, run_parts
from hfpatch.ops.torch_output import Output

WINDOW_BLOCK = 128
TILE_M, TILE_N, LEAST = 128, 64, 16


def supports(problem: Problem) -> str | None:
    """Block lists whose blocks are multiples of 16, sink and window, and ranges of them; several queries, a GPU."""
    if problem.q.device.type != "cuda":
        return "flex_attention compiled for the CPU gives no log-sum-exp, and uncompiled it is dense"
    if problem.q.shape[2] == 1:
        return "it needs several queries"
    for sel in leaves(problem.selection):
        if isinstance(sel, BlockMap):
            if sel.block_q % LEAST or sel.block_k % LEAST:
                return f"blocks of {sel.block_q} x {sel.block_k} are not multiples of {LEAST}"
        elif not isinstance(sel, (SinkWindow, Causal)):
            return f"it does not run a {type(sel).__name__} selection"
    if problem.needs_grad:
        return "gradients through its block lists are not built"
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]` and `lse [B, Hq, Lq]`."""
    out = Output.of(problem)
    run_parts(problem, out, _write)
    return out.out, out.lse


@cache
def compiled() -> Callable[..., Any]:
    """`flex_attention`, compiled once for all sizes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _write(p: Problem, out: Output) -> None:
    at = p.at
    mask = block_mask(p)
    (block_q, block_k), options = mask.BLOCK_SIZE, {"FORCE_USE_FLEX_ATTENTION": True}
    tiles = {"BLOCK_M": min(TILE_M, block_q & -block_q), "BLOCK_N": min(TILE_N, block_k & -block_k)}
    o, lse = _with_lse(
        compiled(), p.q, p.k, p.v, score_mod=_score_mod(p), block_mask=mask, scale=p.scale,
        enable_gqa=p.groups > 1, kernel_options={**options, **tiles},
    )  # fmt: skip
    o = o.unflatten(1, (at.Hkv, p.groups)).transpose(2, 3)
    out.write([(o, lse.unflatten(1, (at.Hkv, p.groups)).transpose(2, 3))])


def _with_lse(attention: Callable[..., Any], *args: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    """Output and lse, asked for as this version of PyTorch wants it."""
    import torch.nn.attention.flex_attention as flex

    if hasattr(flex, "AuxRequest"):
        out, aux = attention(*args, return_aux=flex.AuxRequest(lse=True), **kw)
        return out, aux.lse
    out, lse = attention(*args, return_lse=True, **kw)
    return out, lse


def _score_mod(p: Problem) -> Callable[..., Tensor] | None:
    """Soft-capping and the column bias."""
    cap = p.softcap
    bias = None if p.bias is None else p.bias.float().expand(p.at.B, p.at.Hq, p.at.Lk)

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score if bias is None else score + bias[b, h, j]

    return None if cap is None and bias is None else change


def block_mask(p: Problem) -> Any:
    """The selection as a `BlockMask`, from block lists alone: no mask of tokens is written out."""
    from torch.nn.attention.flex_attention import BlockMask

    at, sel, rule = p.at, p.selection, _causal(p)
    if isinstance(sel, BlockMap):
        sel = sel.fitted(at)
    low = torch.zeros((), dtype=torch.long, device=p.q.device)
    if not isinstance(sel, BlockMap):
        window = sel if isinstance(sel, SinkWindow) else SinkWindow(0, at.Lk)
        sel, rule = window_blocks(p, window), _windowed(p, window)
        low = (_edges(p, sel)[1] - window.window + 1)[:, None]
    first, last = (t[:, None] for t in _edges(p, sel))
    indices, listed = sel.indices.long()[:, :, : len(first)], sel.listed()[:, :, : len(first)]
    start, end = indices * sel.block_k, (indices + 1) * sel.block_k - 1
    full = listed & (end <= first) & (start >= low)
    partial = listed & ~full & (start <= last)
    some, some_indices = (_spread(t, at) for t in _packed(indices, partial))
    whole, whole_indices = (_spread(t, at) for t in _packed(indices, full))
    return BlockMask.from_kv_blocks(
        some, some_indices, whole, whole_indices, BLOCK_SIZE=(sel.block_q, sel.block_k), mask_mod=rule,
        seq_lengths=(at.Lq, at.Lk), compute_q_blocks=False,
    )  # fmt: skip


def _edges(p: Problem, sel: BlockMap) -> tuple[Tensor, Tensor]:
    """Positions `[nQ]` of the first and last query of each query block."""
    first = p.at.off + torch.arange(-(-p.at.Lq // sel.block_q), device=p.q.device) * sel.block_q
    return first, (first + sel.block_q).clamp(max=p.at.Lk) - 1


def _packed(indices: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Number `[B, H, nQ]` of the entries to keep, and the entries `[B, H, nQ, K]` with those first, 0 behind."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    return keep.sum(-1), indices.masked_fill(~keep, 0).gather(-1, order)


def _spread(t: Tensor, at: Layout) -> Tensor:
    """`t [B|1, H, ...]` for every row, and for every query head unless all share it."""
    t = t.to(torch.int32).expand(at.B, *t.shape[1:])
    return (t if t.shape[1] == 1 else t.repeat_interleave(at.Hq // t.shape[1], 1)).contiguous()


def _scalar(value: int, p: Problem) -> Tensor:
    return torch.tensor(value, device=p.q.device)


def _causal(p: Problem) -> Callable[..., Tensor]:
    off = _scalar(p.at.off, p)
    return lambda b, h, i, j: j <= i + off


def _windowed(p: Problem, sel: SinkWindow) -> Callable[..., Tensor]:
    off, sink, window = (_scalar(x, p) for x in (p.at.off, sel.sink, sel.window))
    return lambda b, h, i, j: (j <= i + off) & ((j < sink) | (i + off - j < window))


def window_blocks(p: Problem, sel: SinkWindow) -> BlockMap:
    """The key blocks that the queries of each block of `WINDOW_BLOCK` see, by arithmetic alone."""
    at, size, device = p.at, WINDOW_BLOCK, p.q.device
    first = at.off + torch.arange(-(-at.Lq // size), device=device) * size
    last = (first + size).clamp(max=at.Lk) - 1
    low = (first - sel.window + 1).clamp(min=0) // size
    sinks = (-(-sel.sink // size) * torch.ones_like(low)).minimum(low)
    counts = sinks + last // size - low + 1
    most = min(-(-at.Lk // size), -(-sel.sink // size) + -(-(sel.window + size) // size) + 1)
    slot = torch.arange(most, device=device)
    indices = torch.where(slot < sinks[:, None], slot, low[:, None] + slot - sinks[:, None])
    return BlockMap(indices[None, None], counts[None, None], size, size)
