"""Commands around recipes: run, recipes, compare, and lm-eval's own command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .console import console, progress, quieten

if TYPE_CHECKING:
    from hfpatch.evals.run.runner import Run


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(run)
    app.command()(recipes)
    app.command()(compare)
    passing = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("lm-eval", context_settings=passing)(lm_eval)


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Override: model=..., niah.samples=2, seed=1."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; the recipe's own by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate time and memory, run nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run has finished.")] = False,
) -> None:
    """Run a recipe; started again after a stop, it goes on where it was."""
    quieten()
    from hfpatch.evals.recipe.build import build_run
    from hfpatch.evals.recipe.recipe import find_recipe, load_recipe

    path = find_recipe(recipe)
    found = load_recipe(path, set or [])
    made = build_run(found)
    folder = out or Path(found.data.get("output") or f"out/{path.stem}")
    if dry_run:
        _show_estimate(made)
        return
    execute_and_show(made, folder, fresh=fresh)


def execute_and_show(made: "Run", folder: Path, *, fresh: bool, words: bool = True) -> dict[str, Any] | None:
    """Run, print the tables, write plots and page; None on all but the first process."""
    from hfpatch.evals.report.tables import print_results
    from hfpatch.evals.report.write import write_report  # all that may be missing is missed before the work
    from hfpatch.evals.run.runner import execute

    quieten()
    results = execute(made, folder, fresh=fresh, progress=progress)
    if results is None:
        return None
    print_results(results, console, words=words)
    files = [folder / "results.json", folder / "samples.jsonl", *write_report(results, folder)]
    console.print(f"written to {folder}: {', '.join(f.name for f in files)}")
    return results


def _show_estimate(made: "Run") -> None:
    from hfpatch.evals.run.cells import Session
    from hfpatch.evals.run.estimate import estimate, measure_speed
    from hfpatch.evals.run.stats import memory_text, time_text

    session = Session(made.model, made.variants, made.dtype, made.device, made.seed)
    found = estimate(made, session, measure_speed(session))
    table = Table("job", "cells", "prompts", "time", "memory", header_style="bold")
    for e in found:
        took = time_text(e.seconds) if e.seconds is not None else "unknown"
        table.add_row(e.label, str(e.cells), str(e.prompts), took, memory_text(e.peak))
    total = sum(e.seconds or 0 for e in found)
    table.add_row(
        "all", str(sum(e.cells for e in found)), "", time_text(total), memory_text(max(e.peak for e in found))
    )
    console.print(Text(f"{made.title}: {len(made.variants)} variants of {made.model}"))
    console.print(table)
    console.print("estimated from two short prompts, as if every variant were as slow as dense", style="dim")
    for note in made.notes:
        console.print(note)


def recipes() -> None:
    """Shipped recipes and the question each answers."""
    from hfpatch.evals.recipe.recipe import list_recipes

    grid = Table.grid(padding=(0, 2))
    for name, about in list_recipes().items():
        grid.add_row(Text(name, style="bold"), Text(about))
    console.print(grid)


def compare(
    a: Annotated[Path, typer.Argument(help="Results folder.")],
    b: Annotated[Path, typer.Argument(help="Results folder to compare with it.")],
    everything: Annotated[bool, typer.Option("--all", help="Show equal numbers too.")] = False,
) -> None:
    """Two result folders side by side: what changed, and what was different in how they were made."""
    from hfpatch.evals.report.compare import print_comparison
    from hfpatch.evals.report.read import read_results

    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    print_comparison(read_results(a), read_results(b), names, console, everything=everything)


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command with patched models: hfpatch lm-eval --model_args pretrained=...,patch=... --tasks ..."""
    from ..integrations.lm_eval import run_lm_eval

    raise typer.Exit(run_lm_eval(context.args))
