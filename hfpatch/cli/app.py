"""The commands, and how they end on bad input: one line, exit code 2."""

import sys
from typing import Annotated, NoReturn

import typer

from ..errors import ConfigError, HfpatchError
from ..launch import launched
from . import audit as cli_audit
from . import calibrate as cli_calibrate
from . import evaluate as cli_eval
from . import run as cli_run
from .console import console, errors, one_line, quieten
from .options import Model, PatchArgs, Patches, Settings

EXTRAS = ("matplotlib", "jsonschema", "yaml", "lm_eval", "datasets", "accelerate", "jinja2")


def build_app() -> typer.Typer:
    """All commands; those of `calibrate` are loaded only when they are asked for."""
    app = typer.Typer(
        name="hfpatch",
        help="Change how a loaded Transformers model attends, and measure what that does.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("list")(list_command)
    app.command()(env)
    app.command()(check)
    for module in (cli_eval, cli_audit, cli_run, cli_calibrate):
        module.add_commands(app)
    return app


def run_command() -> NoReturn:
    """Run the command of `sys.argv` and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_arguments(sys.argv[1:])
        launched()
        code = build_app()(standalone_mode=False)
    except (HfpatchError, OSError) as error:
        _leave(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _leave(f"this command needs {error.name}; run `pip install 'hfpatch[eval]'`.")
    except typer.Abort:
        _leave("the input ended too early.")
    except Exception as error:  # the parser's own, whose class depends on where typer keeps it
        if not hasattr(error, "format_message"):
            raise
        _wrong_use(error)
    sys.exit(code if isinstance(code, int) else 0)


def check_arguments(words: list[str]) -> None:
    """Raise ConfigError at an argument that is no text, such as the bytes of a file name in another encoding."""
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"The argument {word!r:.80} is not UTF-8; rename what it names.") from error


def _wrong_use(error: object) -> NoReturn:
    told = error.format_message()  # type: ignore[attr-defined]
    if "NoArgsIsHelp" in type(error).__name__:
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    where = getattr(getattr(error, "ctx", None), "command_path", "hfpatch")
    _leave(f"{told.strip().rstrip('.')}; `{where} --help` lists what there is.")


def _leave(sentence: str) -> NoReturn:
    errors.print(f"hfpatch: {one_line(sentence)}", style="red", soft_wrap=True)
    sys.exit(2)


def list_command(method: Annotated[str | None, typer.Argument(help="Show this method's settings.")] = None) -> None:
    """Methods and presets: what they do, when they act, what they need."""
    from .listing import show_method, show_methods

    if method is None:
        show_methods()
    else:
        show_method(method)


def env() -> None:
    """Versions of everything that matters to results."""
    from hfpatch.evals.run.results import environment

    found = environment()
    lines = {**found.pop("versions"), **found}
    width = max(map(len, lines))
    for name, value in lines.items():
        if value is not None:
            console.print(f"{name:<{width}}  {value}")


def check(model: Model, patch: Patches = None, set: Settings = None, patch_args: PatchArgs = None) -> None:
    """Which attention layers would be patched and how, or why not. Nothing is run, weights are rarely loaded."""
    quieten()
    from hfpatch.evals.run.models import load_skeleton
    from hfpatch.evals.run.variants import parse_settings, parse_variants

    from .check import show_check

    variants = parse_variants(patch or [], parse_settings(set or [], patch_args))[1:]
    show_check(model, load_skeleton(model), variants)
