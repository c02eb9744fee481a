"""What a patched model gives in a scenario, and what the patch reports about it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .scenario import Scenario
from .verdict import short

_SHAPE = re.compile(r"\[\d[\d, ]*\]")


@dataclass
class Outcome:
    """Logits or what was raised; the (module, phase) whose calls ran dense, and why; density by phase.

    partly: some calls of a module and phase ran dense and some did not. empty: layers called that saw no keys at all.
    """

    logits: Tensor | None = None
    error: str = ""
    dense: set[tuple[nn.Module, str]] = field(default_factory=set)
    partly: bool = False
    empty: int = 0
    reasons: str = ""
    density: dict[str, float] = field(default_factory=dict)


def outcome(model: PreTrainedModel, patch: Any, scenario: Scenario) -> Outcome:
    """Run a scenario under a patch and read its report."""
    patch.reset_report()
    got = Outcome()
    try:
        got.logits = scenario.run(model)
    except Exception as error:
        got.error = short(error)
        return got
    report, modules = patch.report(), dict(model.named_modules())
    got.reasons = "; ".join(dict.fromkeys(_SHAPE.sub("[...]", reason) for reason in report.fallbacks()))
    got.density = {phase: report.density(phase) for phase in ("prefill", "chunk", "decode")}
    for line in report.lines:
        dense = sum(line.stats.fallbacks.values())
        got.empty += line.stats.calls > 0 and not line.stats.visible
        if dense:
            got.dense.add((modules[line.name], line.phase))
            got.partly |= dense < line.stats.calls
    return got
