"""Plots and the HTML page of a run."""

from pathlib import Path
from typing import Any

from ..jobs.scores import LIKELY
from .page import write_page
from .plots import accuracy_density, draw
from .summary import headline, score_points, views

DENSITY_PLOT = "accuracy-density"


def write_plots(results: dict[str, Any], out: Path) -> dict[str, Path]:
    """One PNG per job as `out/LABEL.png`, and accuracy against density; label -> path."""
    model = Path(results["model"]["name"]).name
    made, shown = {}, views(results)
    for job, view in zip(results["jobs"], shown, strict=True):
        made[job["label"]] = draw(view.plot, out / f"{job['label']}.png", f"{view.title}: {model}")
    found = headline(results, shown)
    points = score_points(found)
    if points:
        title = f"Accuracy against density: {model}"
        path = out / f"{DENSITY_PLOT}.png"
        made[DENSITY_PLOT] = accuracy_density(points, score_points(found, LIKELY), path, title)
    return made


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """All plots, and the page that holds them; the files written."""
    made = write_plots(results, out)
    page = write_page(results, made, made.get(DENSITY_PLOT), out / "report.html")
    return [*made.values(), page]
