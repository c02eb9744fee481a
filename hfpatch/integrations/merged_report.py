"""One patch report out of those of several processes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report out of those of several processes, with density in all and by phase and the fallbacks on top."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in (x for report in reports for x in report["lines"]):
        key = (line["layer"], line["name"], line["methods"], line["phase"])
        total = lines.setdefault(
            key, {**line, "calls": 0, "attended": 0, "visible": 0, "executors": {}, "fallbacks": {}}
        )
        for name in ("calls", "attended", "visible"):
            total[name] += line[name]
        for name in ("executors", "fallbacks"):
            total[name] = dict(Counter(total[name]) + Counter(line[name]))
        total["density"] = _density([total])
    merged = list(lines.values())
    fallbacks: Counter[str] = sum((Counter(x["fallbacks"]) for x in merged), Counter())
    phases = {x["phase"] for x in merged}
    return {
        "density": _density(merged),
        "density_by_phase": {p: _density([x for x in merged if x["phase"] == p]) for p in sorted(phases)},
        "fallbacks": dict(fallbacks),
        **{**reports[0], "lines": merged},
        "processes": len(reports),
    }


def _density(lines: list[dict[str, Any]]) -> float | None:
    """None where no call came, as when a cache gave all answers."""
    visible = sum(x["visible"] for x in lines)
    return sum(x["attended"] for x in lines) / visible if visible else None
