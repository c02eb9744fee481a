"""Choosing chunks in a few Triton kernels, on a GPU; `score` and `choose` say in torch what they are to find."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...ops.triton_executor import interpreted, power_of_two
from .choose import Room
from .rotary import Rotary
from .table import ChunkTable

MOST_CHUNKS = 1 << 14  # more do not fit into the registers of one program
CHUNKS, KEYS, SLOTS = 16, 64, 256  # of a tile
SCORED = frozenset({"mass", "queries", "mean"})  # rules that have a kernel for one query


@dataclass(frozen=True)
class Scores:
    """Scores of chunks as `choose_kernel` adds them up.

    `each [B, H * members, nQ, C]` are added up plainly, or in logarithms less their normalisers
    `parts [B, H * members, n]`.
    """

    each: Tensor
    parts: Tensor | None = None
    members: int = 1

    @property
    def heads(self) -> int:
        """Heads that choose."""
        return self.each.shape[1] // self.members


def choose(scores: Scores, table: ChunkTable, room: Room) -> Tensor:
    """Unit lists `[B, H, nQ, budget]` of all query blocks, as `choose.choose` makes them."""
    from ...ops.triton_chunks import choose_kernel, list_kernel

    each, parts = scores.each, scores.parts
    (b, _, n, width), heads = each.shape, scores.heads
    upto = each.new_empty((b, heads, n, width), dtype=torch.int32)
    lists = each.new_empty((b, heads, n, room.budget), dtype=torch.int32)
    of = (table.starts.stride(0), width - 1, table.closed, table.seen, room.first, room.stop, room.block, room.local,
          room.sink, room.budget, room.align, heads)  # fmt: skip
    w, count = max(64, power_of_two(width)), 1 if parts is None else parts.shape[2]
    with on(each):
        choose_kernel[(n, b * heads)](
            each, each if parts is None else parts, table.starts, upto, count, *each.stride()[:3], *of,
            MEMBERS=scores.members, SUMMED=parts is None, W=w, WT=power_of_two(count),
            num_warps=min(32, max(4, w // 512)),
        )  # fmt: skip
        list_kernel[(n, -(-room.budget // SLOTS), b * heads)](
            upto, table.starts, lists, *of, STEPS=width.bit_length(), N=SLOTS, num_warps=4
        )
    return lists


def scores(call: AttentionCall, table: ChunkTable, room: Room, rule: str, shared: bool) -> Scores:
    """Of one query, by one of the rules `SCORED`."""
    if rule == "queries":
        return score_attention(call, table, shared)
    table.measure(call.k, room.stop - room.local, measure_open)
    return score_moments(call, table, rule, room.first, shared)


def score_attention(call: AttentionCall, table: ChunkTable, shared: bool) -> Scores:
    """As `score_by_queries` with the one query there is."""
    from ...ops.triton_chunks import chunk_attention_kernel

    d, groups, bias = call.q.shape[-1], call.groups, call.bias
    keys = KEYS // 4 if call.q.dtype == torch.float32 else KEYS if d <= 128 else KEYS // 2
    each, parts = _space(call, table, call.Hq)
    q, k = _last_dense(call.q), _last_dense(call.k)
    if bias is not None:
        bias = _last_dense(bias.expand(call.B, call.Hq, -1))
    with on(q):
        chunk_attention_kernel[(parts.shape[2], call.B * call.Hkv)](
            q, k, q if bias is None else bias, table.starts, each, parts, call.scale,
            0.0 if call.softcap is None else call.softcap, *k.stride()[:3], *q.stride()[:2],
            *((0, 0) if bias is None else bias.stride()[:2]),
            table.starts.stride(0), table.starts.shape[1], table.closed, table.seen, call.Hkv,
            G=groups, D=d, WD=max(16, power_of_two(d)), M=max(16, power_of_two(groups)),
            N=keys, C=CHUNKS,
            CAPPED=call.softcap is not None, BIASED=bias is not None, EXACT=q.dtype == torch.float32,
            UPCAST=interpreted() and q.dtype == torch.bfloat16, num_warps=4,
        )  # fmt: skip
    return Scores(each, parts, call.Hq if shared else groups)


def score_moments(call: AttentionCall, table: ChunkTable, rule: str, upto: int, shared: bool) -> Scores:
    """As `score_chunks` with the one query there is, for the rules "mass" and "mean"."""
    from ...ops.triton_chunks import chunk_moments_kernel

    d, groups, mean, moments = call.q.shape[-1], call.groups, rule == "mean", table.moments
    start, half, interleaved = planes(table.rotary, d)
    each, parts = _space(call, table, call.Hkv if mean else call.Hq)
    q = _last_dense(call.q)
    with on(q):
        chunk_moments_kernel[(parts.shape[2], call.B * call.Hkv)](
            q, moments, table.starts, each, parts, call.scale, *moments.stride()[:2], *q.stride()[:2],
            table.starts.stride(0), table.starts.shape[1], table.closed, table.seen, upto, call.Hkv,
            G=groups, D=d, M=max(16, power_of_two(groups)), C=CHUNKS, S=32, START=start, HALF=half,
            INTERLEAVED=interleaved, POOLED=(call.Hq if shared else groups) if mean else 0, num_warps=4,
        )  # fmt: skip
    if mean:
        return Scores(each, None, call.Hkv if shared else 1)
    return Scores(each, parts, call.Hq if shared else groups)


def measure_open(table: ChunkTable, k: Tensor) -> None:
    """Bring the open chunk's sums and moments up to date with `k [B, Hkv, Lk, D]`, as `ChunkTable.measure` does."""
    from ...ops.triton_chunks import open_kernel

    (b, heads, _, d), k, moments = k.shape, _last_dense(k), table.moments
    start, half, interleaved = planes(table.rotary, d)
    with on(k):
        open_kernel[(b * heads,)](
            k, table.open, moments, *k.stride()[:3], *moments.stride()[:2], table.added, table.closed, table.seen,
            moments.shape[2] - 1, min(torch.finfo(moments.dtype).max, torch.finfo(torch.float32).max), heads,
            D=d, START=start, HALF=half, INTERLEAVED=interleaved, WP=max(16, power_of_two(d - half)), N=16,
            num_warps=4,
        )  # fmt: skip
    table.added = table.seen


def suppress(score: Tensor, radius: int) -> Tensor:
    """As `boundaries.suppress`, which waits for a GPU to say when all entries are settled."""
    from ...ops.triton_boundaries import suppress_kernel

    (b, length), score = score.shape, _last_dense(score)
    alive, kept = score.new_empty((2, b, length), dtype=torch.int8).unbind(0)
    with on(score):
        suppress_kernel[(b,)](
            score, alive, kept, score.stride(0), length, min(radius, length),
            N=min(4096, max(256, power_of_two(length))), num_warps=8 if length <= 4096 else 32,
        )  # fmt: skip
    return kept.bool()


def planes(rotary: Rotary, d: int) -> tuple[int, int, bool]:
    """First channel and number of planes that RoPE turns among `d` channels, and whether neighbours make a plane."""
    turned = rotary.tail or int(d * rotary.share)
    return (d - turned if rotary.tail else 0), turned // 2, rotary.interleaved


def on(x: Tensor) -> AbstractContextManager[object]:
    """The device that kernels for `x` are to be launched on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _space(call: AttentionCall, table: ChunkTable, heads: int) -> tuple[Tensor, Tensor]:
    width = table.starts.shape[1] + 1
    each = call.q.new_empty((call.B, heads, 1, width), dtype=torch.float32)
    return each, call.q.new_empty((call.B, call.Hq, -(-width // CHUNKS)), dtype=torch.float32)


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
