"""What the patch did: calls, density, executors and fallbacks per layer and phase."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class PhaseStats:
    """Counts of one layer in one phase; pairs are (row, query head, query, key)."""

    calls: int = 0
    attended: int | Tensor = 0
    visible: int = 0
    executors: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    def add(self, attended: int | Tensor, visible: int, executor: str) -> None:
        """Count one executed group of rows."""
        self.attended = self.attended + attended
        self.visible += visible
        self.executors[executor] += 1

    @property
    def density(self) -> float:
        """Attended share of the keys dense causal attention sees; 1.0 before the first call."""
        return int(self.attended) / self.visible if self.visible else 1.0


@dataclass(frozen=True)
class LayerLine:
    """One line of the report."""

    layer: int
    name: str
    methods: str
    phase: str
    stats: PhaseStats

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        s = self.stats
        return {
            "layer": self.layer, "name": self.name, "methods": self.methods, "phase": self.phase, "calls": s.calls,
            "attended": int(s.attended), "visible": s.visible, "density": s.density,
            "executors": dict(s.executors), "fallbacks": dict(s.fallbacks),
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All lines, and what was left alone; prints as a table."""

    model: str
    num_layers: int
    patched: int
    lines: list[LayerLine]
    skipped: list[tuple[str, str]]
    notes: list[str]

    def density(self, phase: str | None = None) -> float:
        """Attended share over all layers, of one phase ("prefill", "chunk", "decode") or of all."""
        chosen = [x.stats for x in self.lines if phase in (None, x.phase)]
        visible = sum(s.visible for s in chosen)
        return sum(int(s.attended) for s in chosen) / visible if visible else 1.0

    def fallbacks(self) -> dict[str, int]:
        """Calls that ran dense although a method was active, by reason."""
        total: Counter[str] = Counter()
        for line in self.lines:
            total.update(line.stats.fallbacks)
        return dict(total)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model, "num_layers": self.num_layers, "patched": self.patched,
            "lines": [x.to_dict() for x in self.lines], "skipped": [list(s) for s in self.skipped],
            "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        out = [f"{self.model}: {self.patched} of {self.num_layers} layers patched"]
        called = [x for x in self.lines if x.stats.calls]
        if called:
            out.append(f"{'layer':>5}  {'methods':<20} {'phase':<8} {'calls':>6} {'density':>8}  executor")
        else:
            out.append("no call has reached a patched layer yet")
        for x in called:
            ran = ", ".join(
                f"{name} x{n}" if len(x.stats.executors) > 1 else name for name, n in x.stats.executors.items()
            )
            out.append(f"{x.layer:>5}  {x.methods:<20} {x.phase:<8} {x.stats.calls:>6} {x.stats.density:>8.2%}  {ran}")
            out.extend(f"       dense in {n} of them: {reason}" for reason, n in x.stats.fallbacks.items())
        out.extend(f"left alone: {name} ({why})" for name, why in self.skipped)
        out.extend(f"note: {n}" for n in self.notes)
        return "\n".join(out)
