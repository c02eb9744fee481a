"""`hfpatch calibrate METHOD`: every module of `hfpatch.calibrate` adds its command."""

import importlib
import pkgutil

import typer

from . import calibrate


def add_commands(app: typer.Typer) -> None:
    """Register the group `calibrate`."""
    group = typer.Typer(no_args_is_help=True, help="Train or search what some methods need to know about a model.")

    @group.callback()
    def _group() -> None: ...

    for module in sorted(m.name for m in pkgutil.iter_modules(calibrate.__path__)):
        importlib.import_module(f"{calibrate.__name__}.{module}").add_commands(group)
    app.add_typer(group, name="calibrate")
