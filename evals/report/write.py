"""Plots and the HTML page of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import more_plots, plots
from .page import write_page
from .summary import jobs, score_points

Plot = Callable[[list[dict[str, Any]], Path, str], Path]
PLOTS: dict[str, tuple[Plot, str]] = {
    "niah": (plots.heat_map, "Needle in a haystack"),
    "reader": (plots.heat_map, "Facts beyond the window"),
    "task": (more_plots.scores, "Score by prompt length"),
    "lm-eval": (more_plots.scores, "lm-eval scores"),
    "perplexity": (more_plots.perplexity, "Perplexity by position"),
    "latency": (plots.latency, "Latency"),
    "memory": (plots.memory, "Peak memory"),
}
DENSITY_PLOT = "accuracy-density"


def write_plots(results: dict[str, Any], out: Path) -> dict[str, Path]:
    """One PNG per job as `out/LABEL.png`, and accuracy against density; label -> path."""
    model = Path(results["model"]["name"]).name
    made = {}
    for job in results["jobs"]:
        draw, title = PLOTS[job["kind"]]
        heading = f"{title}: {model}" if job["label"] == job["kind"] else f"{title} ({job['label']}): {model}"
        made[job["label"]] = draw(job["rows"], out / f"{job['label']}.png", heading)
    if jobs(results, "niah", "task", "lm-eval"):
        title = f"Accuracy against density: {model}"
        made[DENSITY_PLOT] = more_plots.accuracy_density(score_points(results), out / f"{DENSITY_PLOT}.png", title)
    return made


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """All plots, and the page that holds them; the files written."""
    made = write_plots(results, out)
    page = write_page(results, made, made.get(DENSITY_PLOT), out / "report.html")
    return [*made.values(), page]
