"""What an audit found, by layer, phase, head and distance to the last key, with intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

EDGES = (64, 512, 4096, 32768)
NAMES = (f"under {EDGES[0]}", *(f"{a} to {b - 1}" for a, b in pairwise(EDGES)), f"{EDGES[-1]} and more")
Z = 1.959964
FEW = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582)  # Student's t at 97.5 % for 1 to 5 degrees of freedom


@dataclass(frozen=True)
class Sample:
    """Sampled queries of one call: `mass`, `error [B, Hq, R]`, `distance [R]` of each query to the last key.

    They stand for `queries` of all rows. `kept`, `best [T]` are the masses of tiles for the patch and for its oracle,
    None where no oracle was asked for.
    """

    mass: Tensor
    error: Tensor
    distance: Tensor
    queries: int
    kept: Tensor | None = None
    best: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over sampled queries, 0 or more each, with its 95 % interval, which is nan for a single query."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain data."""
        low, high = (None if math.isnan(x) else x for x in (self.low, self.high))
        return {"mean": self.mean, "low": low, "high": high, "count": self.count}


@dataclass
class Moments:
    """Sums over weighted values, from which their mean and its interval follow."""

    count: int = 0
    w: float = 0.0
    wx: float = 0.0
    ww: float = 0.0
    wwx: float = 0.0
    wwxx: float = 0.0

    def add(self, values: Tensor, weight: float) -> None:
        """Count `values [n]`, each for as many queries as `weight` says."""
        x = values.cpu().double()
        total, squares = float(x.sum()), float(x.square().sum())
        self.merge(Moments(len(x), weight * len(x), weight * total, weight**2 * len(x), weight**2 * total,
                           weight**2 * squares))  # fmt: skip

    def merge(self, other: "Moments") -> None:
        """Count what another has counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def estimate(self, most: float = math.inf) -> Estimate:
        """The mean of values that are `most` at most; Student's t. Of one value there must be at least one."""
        n, mean = self.count, self.wx / self.w
        if n < 2:
            return Estimate(min(mean, most), math.nan, math.nan, n)
        spread = max(self.wwxx - 2 * mean * self.wwx + mean**2 * self.ww, 0.0)
        half = student(n - 1) * math.sqrt(spread * n / (n - 1)) / self.w
        mean = min(mean, most)
        return Estimate(mean, max(mean - half, 0.0), min(mean + half, most), n)


def student(df: int) -> float:
    """Student's t at 97.5 % for so many degrees of freedom."""
    if df <= len(FEW):
        return FEW[df - 1]
    return Z + (Z**3 + Z) / (4 * df) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * df**2)


@dataclass
class Tally:
    """Sums over the samples of one layer in one phase; `heads [Hq]` is the mass by head, weighted as `mass`."""

    calls: int = 0
    mass: Moments = field(default_factory=Moments)
    error: Moments = field(default_factory=Moments)
    kept: Moments = field(default_factory=Moments)
    best: Moments = field(default_factory=Moments)
    heads: Tensor | None = None
    far: dict[int, Moments] = field(default_factory=dict)  # mass by place among NAMES

    def add(self, sample: Sample) -> None:
        """Count a call. A place in the prompt is one value, the mean over rows and heads."""
        weight = sample.queries / len(sample.distance)
        mass = sample.mass.mean((0, 1)).cpu()  # [R]
        self.calls += 1
        self.mass.add(mass, weight)
        self.error.add(sample.error.mean((0, 1)), weight)
        if sample.kept is not None and sample.best is not None:
            share = sample.queries / len(sample.kept)
            self.kept.add(sample.kept, share)
            self.best.add(sample.best, share)
        heads = sample.mass.mean(0).sum(-1).cpu().double() * weight
        self.heads = heads if self.heads is None else self.heads + heads
        place = torch.bucketize(sample.distance.cpu(), torch.tensor(EDGES), right=True)
        for n in place.unique().tolist():
            self.far.setdefault(n, Moments()).add(mass[place == n], weight)


@dataclass(frozen=True)
class AuditLine:
    """One layer in one phase: mass kept, relative output error, mass of tiles beside their oracle's, mass by head."""

    layer: int
    phase: str
    calls: int
    mass: Estimate
    error: Estimate
    kept: Estimate | None
    best: Estimate | None
    heads: list[float]

    @classmethod
    def of(cls, layer: int, phase: str, tally: Tally) -> "AuditLine":
        """What has been counted."""
        kept, best = (m.estimate(1.0) if m.count else None for m in (tally.kept, tally.best))
        heads = [] if tally.heads is None else (tally.heads / tally.mass.w).clamp(max=1).tolist()
        mass, error = tally.mass.estimate(1.0), tally.error.estimate()
        return cls(layer, phase, tally.calls, mass, error, kept, best, heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        named = {"mass": self.mass, "error": self.error, "kept_in_tiles": self.kept, "oracle_in_tiles": self.best}
        return {
            "layer": self.layer, "phase": self.phase, "calls": self.calls,
            **{name: e and e.to_dict() for name, e in named.items()}, "heads": [round(x, 6) for x in self.heads],
        }  # fmt: skip


@dataclass(frozen=True)
class AuditReport:
    """Lines by layer and phase, mass by distance to the last key over all prefills, and what was not audited."""

    lines: list[AuditLine]
    distances: dict[str, Estimate]
    notes: list[str]

    @classmethod
    def of(cls, tallies: Mapping[tuple[int, str], Tally], notes: Sequence[str] = ()) -> "AuditReport":
        """What has been counted by layer and phase."""
        lines = [AuditLine.of(layer, phase, tally) for (layer, phase), tally in sorted(tallies.items())]
        far: dict[int, Moments] = {}
        for (_, phase), tally in tallies.items():
            for n, moments in tally.far.items() if phase != "decode" else ():  # each step is the last
                far.setdefault(n, Moments()).merge(moments)
        return cls(lines, {NAMES[n]: far[n].estimate(1.0) for n in sorted(far)}, list(notes))

    def mass(self) -> float:
        """Mean mass kept over all lines; nan without any."""
        return _mean(x.mass.mean for x in self.lines)

    def oracle(self) -> tuple[float, float]:
        """Mean mass of the tiles, and of their oracle, over all lines; nan without any."""
        chosen = [(x.kept.mean, x.best.mean) for x in self.lines if x.kept is not None and x.best is not None]
        return _mean(kept for kept, _ in chosen), _mean(best for _, best in chosen)

    def split(self) -> str | None:
        """A sentence on how much the structure loses and how much the choice; None without an oracle."""
        kept, best = self.oracle()
        if math.isnan(kept):
            return None
        lost = max(1 - best, 0.0)
        return (
            f"of the attention, {lost + best - kept:.1%} is lost in the tiles looked at: {lost:.1%} to the structure, "
            f"in which the best choice of as many keys loses as much, and {best - kept:.1%} to the choice"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "lines": [x.to_dict() for x in self.lines],
            "distances": {name: e.to_dict() for name, e in self.distances.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        notes = [f"note: {n}" for n in self.notes]
        if not self.lines:
            return "\n".join(["no sparse call has been audited", *notes])
        out = [
            f"{'layer':>5}  {'phase':<8} {'calls':>5}  {'mass kept':<22} {'oracle, in tiles':<22} error of the output"
        ]
        for x in self.lines:
            tiles = "-" if x.kept is None or x.best is None else f"{x.best.mean:.3f}, patch {x.kept.mean:.3f}"
            out.append(f"{x.layer:>5}  {x.phase:<8} {x.calls:>5}  {x.mass!s:<22} {tiles:<22} {x.error}")
        out += [f"{name} tokens before the last: mass kept {e}" for name, e in self.distances.items()]
        return "\n".join([*out, *filter(None, [self.split()]), *notes])


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
