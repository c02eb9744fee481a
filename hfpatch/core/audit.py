"""What sparse calls miss: attention mass kept and output error, exact for a few queries of every call.

Executors give the log-sum-exp, so the dense attention mass a query keeps is exp(lse_sparse - lse_dense). Dense lse and
output are worked out for a few sampled queries only. For some tiles of queries the kept mass is set beside that of an
oracle: as many key blocks of the same size, chosen by their true mass. What it loses, the structure loses. Only sums
are kept, so an audit takes no more memory after a million tokens than after one.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .audit_report import AuditReport, Sample, Tally
from .audit_rows import dense_rows
from .audit_tiles import is_fixed, tile_masses
from .call import AttentionCall
from .selection import Causal, Selection


@dataclass(eq=False)
class Audit:
    """Looks at `rows` queries of every sparse call and at `tiles` tiles of queries; 0 tiles for no oracle."""

    rows: int = 16
    tiles: int = 1
    seed: int = 0
    tallies: dict[tuple[int, str], Tally] = field(default_factory=dict)
    cropped: int = 0  # calls that came too late: the cache had dropped keys
    in_graph: bool = False  # whether torch.compile has hidden calls

    def __post_init__(self) -> None:
        # apart, so that patches with and without a choice are looked at through the same queries
        self._for_rows, self._for_tiles = (torch.Generator().manual_seed(self.seed) for _ in range(2))

    def look(self, call: AttentionCall, selection: Selection | None, out: Tensor, lse: Tensor) -> None:
        """Compare `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` of a call with dense attention at some of its queries."""
        if call.dropped or selection is None or isinstance(selection, Causal):
            return
        tally = self.tallies.setdefault((call.layer, call.phase), Tally())
        tally.add(self.sample(call, selection, out, lse))

    @torch.no_grad()
    def sample(self, call: AttentionCall, selection: Selection, out: Tensor, lse: Tensor) -> Sample:
        """Mass and error of some queries of a call, one of every equal part of it, and the masses of some tiles."""
        rows = _pick(call, self.rows, self._for_rows)
        wanted, wanted_lse = dense_rows(call, rows)
        got = out[:, rows].transpose(1, 2).float()  # [B, Hq, R, Dv]
        mass = torch.exp(lse[:, :, rows].float() - wanted_lse)
        error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)
        kept, best = self._masses(call, selection, mass)
        return Sample(mass, error, call.Lq - 1 - rows, call.B * call.Lq, kept, best)

    def report(self) -> AuditReport:
        """What has been found so far."""
        notes = []
        if self.cropped:
            notes.append(f"{self.cropped} calls were not audited, as their cache had dropped keys; patch without that")
        if self.in_graph:
            notes.append("steps that torch.compile has put into one graph were not audited")
        return AuditReport.of(self.tallies, notes)

    def _masses(self, call: AttentionCall, selection: Selection, mass: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mass `[T]` of tiles and of their oracles, over rows and heads; of positions alone, the queries' own."""
        if not self.tiles:
            return None, None
        if is_fixed(selection):
            return (kept := mass.mean((0, 1))), kept
        both = [tile_masses(call, selection, n) for n in _pick(call, self.tiles, self._for_tiles).tolist()]
        kept, best = (torch.stack([pair[n].mean() for pair in both]) for n in (0, 1))
        return kept, best


def _pick(call: AttentionCall, count: int, random: torch.Generator) -> Tensor:
    """Queries `[R]`, one at random of every R-th part of the call; all of a call that has no more."""
    if call.Lq <= count:
        return torch.arange(call.Lq, device=call.q.device)
    edges = torch.arange(count) + torch.rand(count, generator=random)
    return (edges * call.Lq / count).long().clamp(max=call.Lq - 1).to(call.q.device)
