"""What an audit found, by layer, phase, head and distance to the last key, with intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

EDGES = (64, 512, 4096, 32768)
Z = 1.959964
FEW = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582)  # Student's t at 97.5 % for 1 to 5 degrees of freedom


@dataclass(frozen=True)
class Sample:
    """Sampled queries of one call: `mass`, `error [B, Hq, R]`, `distance [R]` of each query to the last key.

    `kept`, `best [B, H]` are the masses of one tile for the patch and for its oracle, None where nothing is chosen.
    """

    mass: Tensor
    error: Tensor
    distance: Tensor
    kept: Tensor | None = None
    best: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over sampled queries, 0 or more each, with its 95 % interval, which is nan for a single query."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Tensor, most: float = math.inf) -> "Estimate":
        """Of one value per query, at most `most`; Student's t."""
        values = values.double()
        n, mean = len(values), float(values.mean())
        if n < 2:
            return cls(mean, math.nan, math.nan, n)
        df, mean = n - 1, min(mean, most)
        quantile = (
            FEW[df - 1]
            if df <= len(FEW)
            else Z + (Z**3 + Z) / (4 * df) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * df**2)
        )
        half = quantile * float(values.std()) / math.sqrt(n)
        return cls(mean, max(mean - half, 0.0), min(mean + half, most), n)

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain data."""
        low, high = (None if math.isnan(x) else x for x in (self.low, self.high))
        return {"mean": self.mean, "low": low, "high": high, "count": self.count}


@dataclass(frozen=True)
class AuditLine:
    """One layer in one phase: mass kept, relative output error, and a tile's mass beside its oracle's."""

    layer: int
    phase: str
    calls: int
    mass: Estimate
    error: Estimate
    kept: Estimate | None
    best: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        named = {"mass": self.mass, "error": self.error, "kept_in_tiles": self.kept, "oracle_in_tiles": self.best}
        return {
            "layer": self.layer, "phase": self.phase, "calls": self.calls,
            **{name: e and e.to_dict() for name, e in named.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class AuditReport:
    """Lines by layer and phase; `heads [layers, Hq]` mean mass kept by head, rows as `layers` has them."""

    lines: list[AuditLine]
    layers: list[int]
    heads: Tensor
    distances: dict[str, Estimate]
    dense: dict[tuple[int, str], int]

    def mass(self) -> float:
        """Mean mass kept over all lines; nan without any."""
        return _mean(x.mass.mean for x in self.lines)

    def oracle(self) -> tuple[float, float]:
        """Mean mass of the tiles, and of their oracle, over all lines that chose; nan without any."""
        chosen = [x for x in self.lines if x.kept is not None and x.best is not None]
        return _mean(x.kept.mean for x in chosen if x.kept), _mean(x.best.mean for x in chosen if x.best)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "lines": [x.to_dict() for x in self.lines],
            "heads": {n: [round(v, 6) for v in row] for n, row in zip(self.layers, self.heads.tolist(), strict=True)},
            "distances": {name: e.to_dict() for name, e in self.distances.items()},
            "dense_calls": [{"layer": n, "phase": p, "calls": c} for (n, p), c in sorted(self.dense.items())],
        }  # fmt: skip

    def __str__(self) -> str:
        if not self.lines:
            return "no sparse call has been audited" + ("; all calls seen were dense" if self.dense else "")
        out = [
            f"{'layer':>5}  {'phase':<8} {'calls':>5}  {'mass kept':<22} {'oracle, in tiles':<22} error of the output"
        ]
        for x in self.lines:
            tiles = "-" if x.kept is None or x.best is None else f"{x.best.mean:.3f}, patch {x.kept.mean:.3f}"
            out.append(f"{x.layer:>5}  {x.phase:<8} {x.calls:>5}  {x.mass!s:<22} {tiles:<22} {x.error}")
        out += [f"{name} tokens before the last: mass kept {e}" for name, e in self.distances.items()]
        kept, best = self.oracle()
        if not math.isnan(kept):
            out.append(
                f"the structure loses {1 - best:.1%} of the attention (its oracle), the choice {best - kept:.1%} more"
            )
        return "\n".join(out)


def summed(samples: Mapping[tuple[int, str], Sequence[Sample]], dense: Mapping[tuple[int, str], int]) -> AuditReport:
    """The report on samples, and dense calls counted, by layer and phase."""
    lines: list[AuditLine] = []
    by_layer: dict[int, list[Tensor]] = {}
    for (layer, phase), some in sorted(samples.items()):
        tiles = [s for s in some if s.kept is not None and s.best is not None]
        mass = Estimate.of(torch.cat([s.mass.mean(1).flatten() for s in some]), 1.0)  # one per query, over heads
        error = Estimate.of(torch.cat([s.error.mean(1).flatten() for s in some]))
        lines.append(AuditLine(layer, phase, len(some), mass, error, _tiles(tiles, "kept"), _tiles(tiles, "best")))
        by_layer.setdefault(layer, []).extend(s.mass.transpose(1, 2).flatten(0, 1) for s in some)
    heads = [torch.cat(rows).mean(0).cpu() for rows in by_layer.values()]
    every = [s for some in samples.values() for s in some]
    table = torch.stack(heads) if heads else torch.zeros(0, 0)
    return AuditReport(lines, list(by_layer), table, _by_distance(every), dict(dense))


def _tiles(samples: Sequence[Sample], name: str) -> Estimate | None:
    return Estimate.of(torch.cat([getattr(s, name).mean(1) for s in samples]), 1.0) if samples else None


def _by_distance(samples: Sequence[Sample]) -> dict[str, Estimate]:
    if not samples:
        return {}
    mass = torch.cat([s.mass.mean(1).flatten() for s in samples]).cpu()
    far = torch.cat([s.distance.expand(s.mass.shape[0], -1).flatten() for s in samples]).cpu()
    between = [f"{a} to {b - 1}" for a, b in pairwise(EDGES)]
    names = [f"under {EDGES[0]}", *between, f"{EDGES[-1]} and more"]
    place = torch.bucketize(far, torch.tensor(EDGES), right=True)
    return {name: Estimate.of(mass[place == n], 1.0) for n, name in enumerate(names) if bool((place == n).any())}


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
