"""The triton executor: block lists, windows and dense causality in one fused kernel, few queries split over keys."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from hfpatch.core.selection import BlockMap, Causal, Layout, Selection, SinkWindow
from hfpatch.ops.call import Problem
from hfpatch.ops.parts import leaves, run_parts
from hfpatch.ops.torch_output import Output

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256
FEW_QUERIES = 16
MOST_SPLITS = 64
LEAST_TILES = 4
HOPPER = 9
DATACENTER = (9, 10, 11)  # major capabilities of cards with shared memory for large tiles


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(problem: Problem) -> str | None:
    """Block lists, sink and window, dense causality and ranges of them; forward only, heads up to 256 wide."""
    if problem.q.device.type != "cuda" and not interpreted():
        return "it needs a GPU (or TRITON_INTERPRET=1 set before Python starts, to test on a CPU)"
    if find_spec("triton") is None:
        return "Triton is not installed; run `pip install 'hfpatch[triton]'`"
    other = next((s for s in leaves(problem.selection) if not isinstance(s, (BlockMap, SinkWindow, Causal))), None)
    if other is not None:
        return f"it does not run a {type(other).__name__} selection"
    if problem.needs_grad:
        return "it has no backward pass"
    if problem.q.dtype not in DTYPES:
        return f"it does not run {problem.q.dtype}"
    wide = max(problem.q.shape[-1], problem.v.shape[-1])
    return f"heads of {wide} are wider than {WIDEST}" if wide > WIDEST else None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]` and `lse [B, Hq, Lq]`."""
    out = Output.of(problem)
    with torch.cuda.device(problem.q.device) if problem.q.is_cuda else nullcontext():
        run_parts(problem, out, _launch)
    return out.out, out.lse


@dataclass(frozen=True)
class Tiles:
    """Rows and keys per tile, and how Triton is to compile them. Chosen by arithmetic; not yet tuned on a GPU."""

    rows: int
    keys: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, width: int, dtype: torch.dtype, generation: int, biased: bool) -> "Tiles":
        """Tiles for up to `rows` rows at once and heads padded to `width`, on cards of a generation."""
        m, old = max(16, power_of_two(rows)), generation not in DATACENTER
        if dtype == torch.float32:
            return cls(min(m, 32), 32, 4, 2) if width <= 128 else cls(16, 32, 8, 2)
        if width > 128:
            m = min(m, 32 if old else 64)
            return cls(m, 32, 8 if biased and m == 64 else 4, 3 if old else 2)
        m = min(m, 128)
        return cls(m, 32 if old and biased else 64, 8 if width == 128 and m >= (64 if old else 128) else 4, 3)


@dataclass(frozen=True)
class Lists:
    """What the kernel reads: key blocks in order `[B, U, nQ, K]`, how many are plain and listed `[B, U, nQ]`."""

    order: Tensor
    full: Tensor
    listed: Tensor
    block_q: int
    block_k: int
    sink: int
    window: int
    most_keys: int
    ordered: bool


def _launch(p: Problem, out: Output) -> None:
    """One kernel, or one per split and a merge."""
    from hfpatch.ops.triton_kernels import attend_kernel, merge_kernel

    if isinstance(p.selection, BlockMap):
        p = replace(p, selection=p.selection.fitted(p.at))
    at, d, dv = p.at, p.q.shape[-1], p.v.shape[-1]
    per_head = isinstance(p.selection, BlockMap) and p.selection.indices.shape[1] == at.Hq
    units = at.Hq if per_head else at.Hkv
    packed = at.Hq // units
    widths = [max(16, power_of_two(x)) for x in (d, dv)]
    block_q = p.selection.block_q if isinstance(p.selection, BlockMap) else at.Lq
    tiles = Tiles.of(min(block_q, at.Lq) * packed, max(widths), p.q.dtype, generation(p.q.device), p.bias is not None)
    keys = _lists(p, units, max(1, tiles.rows // packed))
    parts = -(-min(keys.block_q, at.Lq) * packed // tiles.rows)
    programs = -(-at.Lq // keys.block_q) * parts * at.B * units
    splits = split_count(programs, -(-keys.most_keys // tiles.keys), p.q.device)
    q, k, v = (_dense(t) for t in (p.q, p.k, p.v))
    o, lse = out.out, out.lse
    if splits > 1:
        o = o.new_empty((splits, *o.shape), dtype=torch.float32)
        lse = lse.new_empty((splits, *lse.shape))
    bias = None if p.bias is None else p.bias.expand(at.B, at.Hq, at.Lk).contiguous()
    grid = (programs // (at.B * units), at.B * units, splits)
    attend_kernel[grid](
        q, k, v, o, lse, q if out.sinks is None else out.sinks, q if bias is None else bias,
        keys.order, keys.full, keys.listed, p.scale, 0.0 if p.softcap is None else p.softcap,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        o.stride(0) if splits > 1 else 0, *(o.stride(n) for n in (-4, -3, -2)),
        lse.stride(0) if splits > 1 else 0, *(lse.stride(n) for n in (-3, -2)),
        *(bias.stride()[:2] if bias is not None else (0, 0)),
        *keys.order.stride()[:3], *keys.full.stride(), *keys.listed.stride(),
        at.Lq, at.Lk, units, at.Hkv, keys.block_q, parts, keys.sink, keys.window,
        P=packed, D=d, DV=dv, BLOCK_K=keys.block_k, M=tiles.rows, N=tiles.keys, WD=widths[0], WV=widths[1],
        SPLITS=splits, ORDERED=keys.ordered, CAPPED=p.softcap is not None, SINKS=out.sinks is not None,
        BIASED=bias is not None, EXACT=p.q.dtype == torch.float32,
        UPCAST=interpreted() and p.q.dtype == torch.bfloat16, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        count = at.B * at.Hq * at.Lq
        merge_kernel[(count,)](
            o, lse, out.out, out.lse, *out.out.stride()[:3], *out.lse.stride()[:2], at.Lq, at.Hq, count,
            SPLITS=splits, WS=power_of_two(splits), DV=dv, WV=widths[1], num_warps=4,
        )  # fmt: skip


def _lists(p: Problem, units: int, block_q: int) -> Lists:
    """The selection as the kernel reads it; a window's query blocks are `block_q` long."""
    sel, at = p.selection, p.at
    if isinstance(sel, BlockMap):
        shape = (at.B, units, *sel.counts.shape[2:])
        most = sel.indices.shape[-1] * sel.block_k
        if at.Lq <= FEW_QUERIES:
            listed = sel.counts.expand(shape)
            return Lists(
                sel.indices.expand(*shape, -1), listed, listed, sel.block_q, sel.block_k, 0, 0, most, False
            )  # fmt: skip
        order, full, listed = (t.expand(at.B, units, *t.shape[2:]) for t in _ordered(sel, at))
        return Lists(order, full, listed, sel.block_q, sel.block_k, 0, 0, most, True)
    window = _window(sel, at.Lk)
    none = torch.empty((1, 1, 1, 1), dtype=torch.int32, device=p.q.device)
    most = min(at.Lk, window.sink + window.window + block_q)
    return Lists(none, none[0], none[0], min(block_q, at.Lq), 0, window.sink, window.window, most, True)


def _ordered(sel: BlockMap, at: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks seen whole first `[B|1, H, nQ, K]`, how many these and all are `[B|1, H, nQ]`."""
    from hfpatch.ops.triton_kernels import order_kernel

    b, heads, _, slots = sel.indices.shape
    nq, indices, counts = -(-at.Lq // sel.block_q), _dense(sel.indices), sel.counts.expand(sel.indices.shape[:3])
    order = indices.new_empty((b, heads, nq, slots), dtype=torch.int32)
    full, listed = indices.new_empty((2, b, heads, nq), dtype=torch.int32).unbind(0)
    order_kernel[(nq, b * heads)](
        indices, counts, order, full, listed, *indices.stride()[:3], *counts.stride(),
        slots, at.off, at.Lk, sel.block_q, heads, BLOCK_K=sel.block_k, W=min(1024, max(16, power_of_two(slots))),
        num_warps=4,
    )  # fmt: skip
    return order, full, listed


def _window(sel: Selection, length: int) -> SinkWindow:
    """Sink and window within the keys there are; dense causality is a window of all keys."""
    if isinstance(sel, SinkWindow):
        return SinkWindow(min(max(sel.sink, 0), length), min(max(sel.window, 0), length))
    return SinkWindow(0, length)


def generation(device: torch.device) -> int:
    """Major compute capability of the card; that of Hopper where there is none."""
    return torch.cuda.get_device_properties(device).major if device.type == "cuda" else HOPPER


def split_count(programs: int, tiles: int, device: torch.device) -> int:
    """Splits of the keys that fill the GPU twice over, each with a few tiles of keys; a power of two."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = min(2 * processors // programs, tiles // LEAST_TILES, MOST_SPLITS)
    return 1 if wanted < 2 else 1 << (wanted.bit_length() - 1)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
