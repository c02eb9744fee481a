"""`hfpatch calibrate METHOD`: modules of `hfpatch.calibrate` add their commands, loaded only when asked for."""

import importlib
import pkgutil
import sys

import typer

from .. import calibrate


def add_commands(app: typer.Typer) -> None:
    """Register the group `calibrate`."""
    group = typer.Typer(no_args_is_help=True, help="Train or search what some methods need to know about a model.")

    @group.callback()
    def _group() -> None: ...

    if "calibrate" in sys.argv[1:2]:
        for found in sorted(pkgutil.iter_modules(calibrate.__path__), key=lambda m: m.name):
            name = f"{found.name}.command" if found.ispkg else found.name
            module = importlib.import_module(f"{calibrate.__name__}.{name}")
            if hasattr(module, "add_commands"):
                module.add_commands(group)
    app.add_typer(group, name="calibrate")
