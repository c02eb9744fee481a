"""Decode steps of `dhsa` in a graph of torch.compile: chunk lists of fixed length, closed by a custom operation."""

import json

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.call import AttentionCall
from ...core.graph_step import GraphKeys, GraphStep
from ...core.logits import capped
from .boundaries import to_list
from .choose import Units, kept_units, list_units, whole
from .config import DhsaConfig
from .finder import Finder
from .table import ChunkTable


def room_for(config: DhsaConfig, capacity: int) -> int:
    """Chunks that a cache of `capacity` slots has room for."""
    pieces = capacity // (config.close_after or capacity) + 2
    return Finder(config, None).most(capacity) + 4 * pieces


def chunk_lists(table: ChunkTable, config: DhsaConfig, capacity: int) -> dict[str, Tensor]:
    """Where the table's chunks begin, `starts [B, S]` filled up with `closed [B, 1]`, where the open one does.

    An empty table's `closed` is 0: the first sparse step cuts all that is there.
    """
    starts = torch.where(table.starts < table.closed, table.starts, table.closed).sort(1).values
    short = room_for(config, capacity) - starts.shape[1]
    starts = pad(starts, (0, short), value=table.closed) if short >= 0 else starts[:, :short]
    return {"starts": starts, "closed": torch.full_like(starts[:, :1], table.closed)}


@torch.library.custom_op("hfpatch::close_chunks", mutates_args=("starts", "closed"))
def close_chunks(k: Tensor, start: Tensor, last: Tensor, starts: Tensor, closed: Tensor, settings: str) -> None:
    """Close the open chunk of rows as `Dhsa.select` would in this step, whose query is in slot `last`.

    An operation of its own, since only few steps have to do it; a GPU is waited for to see which. `k [B, Hkv, C, D]`,
    `start [B|1, 1]`, `starts [B, S]` and `closed [B, 1]` as in `chunk_lists`, `settings` those of the method.
    """
    first = start.expand(len(k), 1)[:, 0]
    known = zip((last - first).tolist(), closed[:, 0].tolist(), first.tolist(), strict=True)
    config = DhsaConfig(**json.loads(settings))
    for row, (off, done, begin) in enumerate(known):
        sparse = off + 1 >= config.sparse_decode_from and off + 1 > config.units(off + 1, True) * config.align
        if not sparse or (done and not 0 < config.close_after <= off - done):
            continue
        keys = k[row : row + 1, :, begin : begin + off]
        flags = Finder(config, None).find(AttentionCall(0, 1, "decode", keys, keys, keys, 1.0), done, off, None)
        new, used = to_list(flags, done)[0], int((starts[row] < done).sum())
        new = new[: starts.shape[1] - used]
        starts[row, used:] = off
        starts[row, used : used + len(new)] = new
        closed[row] = off


def chosen_keys(step: GraphStep, config: DhsaConfig, settings: str) -> GraphKeys | None:
    """The token lists of a step; None where every step of such a cache is dense."""
    align, most = config.align, config.units(step.capacity, True)
    sparse_from = config.sparse_decode_from
    if step.capacity < sparse_from or (align == 1 and step.capacity <= most):
        return None
    call, starts, closed, length = step.call, step.state["starts"], step.state["closed"], step.length
    close_chunks(call.k, step.start, step.last, starts, closed, settings)
    units = _units(config, length)
    dense = (length < sparse_from) | (length <= units * align)
    begins = torch.cat([starts, closed], 1)
    ends = torch.cat([begins[:, 1:], length.expand_as(closed)], 1)
    score = _score(step, begins, ends, 1 if config.head_sharing == "all" else call.Hkv)
    room = _room(config, length.maximum(units * align + 1), units, most)
    kept, first = kept_units(score, whole(begins, align), whole(ends, align), room)
    lists = list_units(kept, first, room)[:, :, 0]  # [B, H, most]
    slot = torch.arange(most * align, device=lists.device)
    at = (lists[..., None] * align + slot[:align]).flatten(2) if align > 1 else lists
    seen = (slot < units * align)[:, None].expand_as(at)
    if sparse_from <= most * align:
        dense = dense[..., None]
        return GraphKeys(torch.where(dense, slot, at), seen | dense)
    seen = seen & (at < length[..., None])
    places = torch.where(seen, step.slots(at), step.capacity)
    keep = seen.new_zeros(*at.shape[:2], step.capacity + 1).scatter(2, places, True)[..., :-1]
    return GraphKeys(None, keep | dense[..., None])


def _units(config: DhsaConfig, length: Tensor) -> Tensor:
    """`DhsaConfig.units` of a decode step for lengths `[B|1, 1]`."""
    budget = config.budget if config.decode_budget is None else config.decode_budget
    if isinstance(budget, int):
        return torch.full_like(length, config.units(1, True))
    exact = torch.float32 if length.device.type == "mps" else torch.float64
    wanted = (length.to(exact) * budget).ceil().long().clamp_min(config.least_in_decode)
    return -(-wanted // config.align)


def _score(step: GraphStep, begins: Tensor, ends: Tensor, heads: int) -> Tensor:
    """`score_by_queries` of one query: `[B, heads, 1, S]` for chunks at `[begins, ends)`, both `[B, S]`."""
    call = step.call
    q = (call.scale * call.q[:, :, 0]).unflatten(1, (call.Hkv, -1))
    logits = capped(q @ call.k.mT, call.softcap).flatten(1, 2).float()  # [B, Hq, C]
    slot = torch.arange(step.capacity, device=logits.device)
    seen = (slot >= step.start) & (slot <= step.last)
    mass = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).unflatten(1, (heads, -1)).sum(2)
    exact = torch.float32 if mass.device.type == "mps" else torch.float64
    upto = pad(mass.to(exact).cumsum(-1), (1, 0))
    begin, end = (upto.gather(2, (e + step.start)[:, None].expand(-1, heads, -1)) for e in (begins, ends))
    size = (ends - begins).clamp_min(1).float()[:, None]
    return ((end - begin).clamp_min(0).float() / size).log()[:, :, None]


def _room(config: DhsaConfig, length: Tensor, units: Tensor, most: int) -> Units:
    """The budgets `units [B|1, 1]` of rows of `length` tokens, in lists of `most` units."""
    align, off = config.align, (length - 1)[..., None]  # [B|1, 1, 1]
    sink = -(-config.sink // align)
    low = whole(off - config.local, align).clamp_min(sink)
    recent = units[..., None] - whole(off + align, align) + low
    return Units(sink, most, 0, off, low, recent, low - recent, torch.arange(most, device=low.device))
