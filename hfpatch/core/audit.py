"""What sparse calls miss: attention mass kept and output error, exact for a few queries of every call.

Executors give the log-sum-exp, so the dense attention mass a query keeps is exp(lse_sparse - lse_dense). Dense lse and
output are worked out for a few sampled queries only. For one tile of queries per call the kept mass is set beside that
of an oracle: as many key blocks of the same size, chosen by their true mass. What it loses, the structure loses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .audit_report import AuditReport, Sample, summed
from .call import AttentionCall
from .selection import BlockMap, Causal, Rows, Selection, SinkWindow

CHUNK_ELEMENTS = 1 << 24


@dataclass(eq=False)
class Audit:
    """Looks at `rows` queries of every sparse call and at one tile of them; `samples` by layer and phase."""

    rows: int = 16
    oracle: bool = True
    seed: int = 0
    samples: dict[tuple[int, str], list[Sample]] = field(default_factory=dict)
    dense: dict[tuple[int, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(self.seed)

    def look_dense(self, call: AttentionCall) -> None:
        """Count a call that sees all keys."""
        key = (call.layer, call.phase)
        self.dense[key] = self.dense.get(key, 0) + 1

    @torch.no_grad()
    def look(self, call: AttentionCall, selection: Selection | None, out: Tensor, lse: Tensor) -> None:
        """Compare `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` of a call with dense attention at some of its queries."""
        if selection is None:
            self.look_dense(call)
            return
        key = (call.layer, call.phase)
        rows = self._pick(call)
        wanted, wanted_lse = dense_rows(call, rows)
        got = out[:, rows].transpose(1, 2).float()  # [B, Hq, R, Dv]
        mass = torch.exp(lse[:, :, rows] - wanted_lse)
        error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)
        kept, best = tile_masses(call, selection, self._query(call)) if self.oracle else (None, None)
        sample = Sample(mass, error, call.Lq - 1 - rows, kept, best)
        self.samples.setdefault(key, []).append(sample)

    def report(self) -> AuditReport:
        """What has been found so far."""
        return summed(self.samples, self.dense)

    def _pick(self, call: AttentionCall) -> Tensor:
        """Queries `[R]`, one at random of every R-th part of the call; all of a call that has no more."""
        if call.Lq <= self.rows:
            return torch.arange(call.Lq, device=call.q.device)
        edges = torch.arange(self.rows) + torch.rand(self.rows, generator=self._random)
        return (edges * call.Lq / self.rows).long().clamp(max=call.Lq - 1).to(call.q.device)

    def _query(self, call: AttentionCall) -> int:
        return int(torch.randint(call.Lq, (), generator=self._random))


def dense_rows(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Dense `out [B, Hq, R, Dv]` and `lse [B, Hq, R]` in float32 of the queries `rows [R]` of a call."""
    outs, lses = [], []
    v = call.v.float().repeat_interleave(call.groups, 1)
    for some in rows.split(max(1, CHUNK_ELEMENTS // (call.B * call.Hq * call.Lk))):
        logits = row_logits(call, some)
        lse = logits.logsumexp(-1)
        if call.sinks is not None:
            lse = torch.logaddexp(lse, call.sinks.float()[:, None])
        outs.append(torch.exp(logits - lse[..., None]) @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def row_logits(call: AttentionCall, rows: Tensor) -> Tensor:
    """Logits `[B, Hq, R, Lk]` in float32 of the queries `rows [R]`, -inf for later keys."""
    q = call.q[:, :, rows].float().unflatten(1, (call.Hkv, call.groups)).flatten(2, 3)
    logits = ((q * call.scale) @ call.k.float().mT).unflatten(2, (call.groups, -1)).flatten(1, 2)
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if call.bias is not None:
        logits = logits + call.bias.float()[:, :, None]
    return logits.masked_fill_(call.k_pos > (call.off + rows)[:, None], -torch.inf)


@dataclass(frozen=True)
class Tile:
    """Queries `start..stop` that share a choice: `keep` bool `[B|1, H, n]` of blocks of `size` keys."""

    start: int
    stop: int
    keep: Tensor
    size: int


def tile_of(call: AttentionCall, selection: Selection, query: int) -> Tile | None:
    """The tile that holds a query and its choice; None where nothing was chosen (dense, or by position alone)."""
    at = call.layout
    for start, stop, part in _leaves(selection, call, query):
        inner = at.rows(start, stop)
        if isinstance(part, BlockMap):
            n = (query - start) // part.block_q
            first = start + n * part.block_q
            return Tile(first, min(first + part.block_q, stop), part.block_mask(inner)[:, :, n], part.block_k)
        if isinstance(part, (Causal, SinkWindow)):
            return None
        row = inner.rows(query - start, query - start + 1)
        mask = part.mask(inner, torch.arange(row.Lk, device=row.device))[:, :, query - start]
        return Tile(query, query + 1, mask.expand(-1, at.Hq, -1), 1)
    return None


def _leaves(selection: Selection, call: AttentionCall, query: int) -> Iterator[tuple[int, int, Selection]]:
    """The range of queries that holds `query`, and its selection."""
    if not isinstance(selection, Rows):
        yield 0, call.Lq, selection
        return
    for start, stop, part in selection.ranges(call.layout):
        if start <= query < stop:
            yield start, stop, part


def tile_masses(call: AttentionCall, selection: Selection, query: int) -> tuple[Tensor | None, Tensor | None]:
    """Dense mass `[B, H]` that the tile of a query keeps, and what as many of the best blocks would keep."""
    tile = tile_of(call, selection, query)
    if tile is None:
        return None, None
    heads, rows = tile.keep.shape[1], torch.arange(tile.start, tile.stop, device=call.q.device)
    blocks = tile.keep.shape[2]
    mass = call.q.new_zeros((call.B, heads, blocks), dtype=torch.float32)
    for some in rows.split(max(1, CHUNK_ELEMENTS // (call.B * call.Hq * call.Lk))):
        logits = row_logits(call, some)
        lse = logits.logsumexp(-1, keepdim=True)
        if call.sinks is not None:
            lse = torch.logaddexp(lse, call.sinks.float()[:, None, None])
        share = torch.exp(logits - lse).unflatten(1, (heads, -1)).sum((2, 3))[..., : blocks * tile.size]  # [B, H, Lk]
        at = (torch.arange(share.shape[2], device=share.device) // tile.size).expand_as(share)
        mass.scatter_add_(2, at, share)
    mass = mass / (len(rows) * (call.Hq // heads))
    ranked = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    seen = -(-(call.off + tile.stop) // tile.size)
    count = tile.keep[..., :seen].sum(-1).expand(call.B, -1)
    best = ranked.gather(2, (count - 1).clamp_min(0)[..., None])[..., 0].masked_fill(count == 0, 0.0)
    return (mass * tile.keep).sum(-1), best
