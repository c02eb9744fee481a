"""The `hfpatch` command."""

import sys
from typing import Annotated

import typer

from .cli_console import console, errors, quieten
from .cli_options import Model, PatchArgs, Patches, Settings
from .errors import HfpatchError

EXTRAS = ("matplotlib", "jsonschema", "yaml", "lm_eval", "datasets", "accelerate", "jinja2")

app = typer.Typer(
    name="hfpatch",
    help="Change how a loaded Transformers model attends, and measure what that does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: bad input gives one sentence and exit code 2."""
    from . import cli_calibrate, cli_eval, cli_run

    cli_eval.add_commands(app)
    cli_run.add_commands(app)
    cli_calibrate.add_commands(app)
    try:
        app()
    except (HfpatchError, OSError) as error:
        _leave(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _leave(f"this command needs {error.name}; run `pip install 'hfpatch[eval]'`.")


def _leave(sentence: str) -> None:
    errors.print(f"hfpatch: {sentence}", style="red", markup=False, soft_wrap=True)
    sys.exit(2)


@app.command("list")
def list_command(method: Annotated[str | None, typer.Argument(help="Show this method's settings.")] = None) -> None:
    """Methods and presets: what they do, when they act, what they need."""
    from .cli_list import show_method, show_methods

    if method is None:
        show_methods()
    else:
        show_method(method)


@app.command()
def env() -> None:
    """Versions of everything that matters to results."""
    from .evals.results import environment

    found = environment()
    lines = {**found.pop("versions"), **found}
    width = max(map(len, lines))
    for name, value in lines.items():
        if value is not None:
            console.print(f"{name:<{width}}  {value}", markup=False)


@app.command()
def check(model: Model, patch: Patches = None, set: Settings = None, patch_args: PatchArgs = None) -> None:
    """Which attention layers would be patched and how, or why not. Nothing is run, weights are rarely loaded."""
    quieten()
    from .cli_check import show_check
    from .evals.models import load_skeleton
    from .evals.variants import parse_settings, parse_variants

    variants = parse_variants(patch or [], parse_settings(set or [], patch_args))[1:]
    show_check(model, load_skeleton(model), variants)


if __name__ == "__main__":
    main()
