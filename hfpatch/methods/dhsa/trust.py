"""Whether the kernels of `fused` serve a call: on a GPU, where Triton is, once they have chosen right in small."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...ops.self_check import looked_at_once
from ...ops.triton_executor import DTYPES, WIDEST
from . import boundaries, fused
from .choose import Room, Rooms, choose
from .rotary import Rotary
from .score import pool_queries, score_by_queries, score_chunks
from .table import ChunkTable

CLOSED, KEYS, QUERIES, BLOCK = (97, 231), 257, 33, 8
AWRY = 0.02  # share of the tokens in lists that may be others, where scores are equal but for rounding


def serves(
    call: AttentionCall, table: ChunkTable, room: Room, rule: str | None, shared: bool, executor: str | None
) -> bool:
    """Whether kernels choose: those that score one query by `rule`, or, without a rule, from scores that are given.

    An executor that was named decides, as it does for attention; "triton" then needs no proof.
    """
    q = call.q
    if not _there(q, executor):
        return False
    if q.dtype not in DTYPES or q.shape[-1] > WIDEST or table.starts.shape[1] >= fused.MOST_CHUNKS:
        return False
    extras = call.softcap is not None, call.bias is not None
    key = ("dhsa", rule, shared, q.device, q.dtype, q.shape[-1], call.groups, extras, table.rotary, room.align)
    what = "The Triton kernels that choose for 'dhsa' are"
    return executor == "triton" or looked_at_once(key, what, lambda: fault(call, table, room, rule, shared)) is None


def suppressor(score: Tensor, executor: str | None) -> boundaries.Suppress:
    """What drops boundaries beside better ones: a kernel where it serves `score [B, n]`, else torch."""
    if not _there(score, executor) or score.dtype != torch.float32:
        return boundaries.suppress
    what = "The Triton kernel that finds boundaries for 'dhsa' is"
    proven = executor == "triton" or looked_at_once(("dhsa", score.device), what, lambda: _dropped(score)) is None
    return fused.suppress if proven else boundaries.suppress


def _there(x: Tensor, executor: str | None) -> bool:
    return x.device.type == "cuda" and executor in (None, "triton") and find_spec("triton") is not None


def _dropped(like: Tensor) -> str | None:
    """What is wrong with the boundaries that the kernel keeps of small scores, some of them equal, or None."""
    made = torch.Generator("cpu").manual_seed(0)
    score = (torch.randn(2, 5000, generator=made, device="cpu") * 20).round()
    score[:, ::7] = -torch.inf
    same = torch.equal(fused.suppress(score.to(like.device), 4).cpu(), boundaries.suppress(score, 4))
    return None if same else "it keeps other boundaries of a small problem"


def fault(like: AttentionCall, table: ChunkTable, room: Room, rule: str | None, shared: bool) -> str | None:
    """What is wrong with the lists that kernels make for a small call like this one, or None."""
    here = small(like, torch.device("cpu"), torch.float32, rule is None)
    there = small(like, like.q.device, like.q.dtype, rule is None)
    block = BLOCK * room.align if rule is None else 1
    rooms = Rooms(3, 9, room.align)
    want, score = _by_torch(
        here, small_table(here, table.rotary, like.q.dtype), _room(rooms, here, block), rule, shared
    )
    own = small_table(there, table.rotary, like.q.dtype)
    if rule is None:
        got = fused.choose(fused.Scores(score.to(like.q.device)), own, _room(rooms, there, block)).cpu()
        return None if torch.equal(got, want) else "they choose wrong lists of a small problem"
    of = _room(rooms, there, block)
    got = fused.choose(fused.scores(there, own, of, rule, shared), own, of).cpu()
    if got.shape != want.shape or bool((got.diff() < 1).any()) or int(got.min()) < 0 or int(got.max()) > KEYS:
        return "their lists of a small problem are out of order"
    same = (got[..., :, None] == want[..., None, :]).any(-1).double().mean()
    return None if float(same) >= 1 - AWRY else f"{1 - float(same):.0%} of their lists of a small problem are wrong"


def small(like: AttentionCall, device: torch.device, dtype: torch.dtype, several: bool) -> AttentionCall:
    """A call of two rows and some hundred keys with the heads' sizes and the extras of another."""
    made = torch.Generator("cpu").manual_seed(0)
    hkv = min(like.Hkv, 2)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device="cpu").to(like.q.dtype).to(device, dtype)

    q = numbers(2, hkv * like.groups, QUERIES if several else 1, like.q.shape[-1])
    k = numbers(2, hkv, KEYS, like.q.shape[-1])
    bias = None if like.bias is None else numbers(1, 1, KEYS)
    return AttentionCall(0, 1, "decode", q, k, k, like.q.shape[-1] ** -0.5, like.softcap, bias=bias, rows=(0, 1))


def small_table(call: AttentionCall, rotary: Rotary, dtype: torch.dtype) -> ChunkTable:
    """A table of ragged chunks for the small call, closed in two parts; keys in the open chunk, moments in dtype."""
    made, k = torch.Generator("cpu").manual_seed(1), call.k
    table = ChunkTable.empty(torch.zeros(k.shape, dtype=dtype, device="cpu"), rotary)
    for stop in CLOSED:

        def find(start: int, stop: int) -> Tensor:
            flags = torch.rand(call.B, stop - start, generator=made, device="cpu") < 0.12
            flags[:, 0] = True
            return flags

        table.close(stop, find)
    table.grow(table.closed, call.Lk)
    return replace(table, **{n: getattr(table, n).to(k.device) for n in ("starts", "moments", "open")})


def _room(rooms: Rooms, call: AttentionCall, block: int) -> Room:
    """A room of 80 tokens or so for all queries of the small call."""
    align = rooms.around[2]
    return rooms.of((call.off, call.Lk), block, -(-80 // align), call.Lk, call.q.device)


def _by_torch(
    call: AttentionCall, table: ChunkTable, room: Room, rule: str | None, shared: bool
) -> tuple[Tensor, Tensor]:
    """The lists and the scores they follow from, worked out on the CPU; without a rule by that of means."""
    chunks = table.chunks(call.k)
    if rule == "queries":
        score = score_by_queries(call, chunks, 0, 1, 1, 1, shared)
    else:
        q = pool_queries(call.q, room.block)
        score = score_chunks(q, chunks, rule or "mean", room.units.begin, call.scale, shared)
    return choose(score, chunks.starts, chunks.ends, room), score
