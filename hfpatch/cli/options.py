"""Options that several commands share, their ranges, and how their texts are read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

MANY = 1_000_000  # of whatever is counted
LONGEST = 100_000_000  # tokens
LAST_SEED = 2**32 - 1
_NUMBER = re.compile(r"([0-9]{1,15})(k?)", re.IGNORECASE)


def number(help: str, low: float, high: float = MANY) -> Any:
    """A numeric option that takes `low` to `high`; the command ends with one sentence at anything else."""
    return typer.Option(help=help, callback=_between(low, high))


def _between(low: float, high: float) -> Callable[[typer.CallbackParam, Any], Any]:
    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is None or low <= value <= high:  # nan is not
            return value
        name = str(param.name).replace("_", "-")
        raise ConfigError(f"--{name} {value} is out of range; it must be at least {low:,} and at most {high:,}.")

    return check


Model = Annotated[str, typer.Argument(help="Model folder, GGUF file, Hub id, or 'embedded'.", metavar="MODEL")]
Patches = Annotated[
    list[str] | None,
    typer.Option(
        "--patch", "-p",
        help="Method or preset, with settings (streaming:window=512), composed (a+b), or a saved config; repeatable.",
    ),
]  # fmt: skip
Settings = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Setting for the patches that know it: window=512; repeatable.")
]
PatchArgs = Annotated[str | None, typer.Option(help="Settings as JSON: '{\"window\": 512}'.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 512,4k,32k.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0; the accelerator if there is one.")]
Seed = Annotated[int, number("Seed of keys, values and haystacks.", 0, LAST_SEED)]
Out = Annotated[Path, typer.Option(help="Folder for results, samples and plots.")]


def numbers(text: str, what: str, *, low: int, high: int = LONGEST) -> list[int]:
    """Whole numbers from text such as `512,4k`; k means 1024. Raises ConfigError."""
    found = []
    for part in text.replace(" ", "").split(","):
        match = _NUMBER.fullmatch(part)
        if match is None:
            raise ConfigError(f"--{what} {text!r:.80} cannot be read at {part!r:.40}; write for example 512,4k.")
        value = int(match[1]) * (1024 if match[2] else 1)
        if not low <= value <= high:
            raise ConfigError(f"--{what}: {part} is out of range; it must be at least {low} and at most {high}.")
        found.append(value)
    return list(dict.fromkeys(found))


def one_number(text: str, what: str, *, low: int, high: int = LONGEST) -> int:
    """One whole number from text such as `4k`. Raises ConfigError."""
    found = numbers(text, what, low=low, high=high)
    if len(found) > 1:
        raise ConfigError(f"--{what} {text!r:.80} holds several numbers; it takes one.")
    return found[0]
