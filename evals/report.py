"""Plots of a run, by kind of job."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import plots

Plot = Callable[[list[dict[str, Any]], Path, str], Path]
PLOTS: dict[str, tuple[Plot, str]] = {
    "niah": (plots.heat_map, "Needle in a haystack"),
    "latency": (plots.latency, "Latency"),
    "memory": (plots.memory, "Peak memory"),
}


def write_plots(results: dict[str, Any], out: Path) -> dict[str, Path]:
    """One PNG per job, as `out/LABEL.png`; label -> path."""
    name = Path(results["model"]["name"]).name
    made = {}
    for job in results["jobs"]:
        draw, title = PLOTS[job["kind"]]
        made[job["label"]] = draw(job["rows"], out / f"{job['label']}.png", f"{title}: {name}")
    return made
