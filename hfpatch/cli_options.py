"""Options that several commands share, and how their texts are read."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import ConfigError

Model = Annotated[str, typer.Argument(help="Model folder, Hub id, or 'embedded'.", metavar="MODEL")]
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
Seed = Annotated[int, typer.Option(help="Seed of keys, values and haystacks.")]
Out = Annotated[Path, typer.Option(help="Folder for results, samples and plots.")]


def numbers(text: str, what: str, *, low: float, high: float = float("inf")) -> list[int]:
    """Whole numbers from text such as `512,4k`; k means 1024. Raises ConfigError."""
    found = []
    for part in text.replace(" ", "").split(","):
        digits, factor = (part[:-1], 1024) if part.lower().endswith("k") else (part, 1)
        if not digits.isdigit():
            raise ConfigError(f"--{what} {text!r} cannot be read at {part!r}; write for example 512,4k.")
        value = int(digits) * factor
        if not low <= value <= high:
            upto = "" if high == float("inf") else f" and at most {high:g}"
            raise ConfigError(f"--{what}: {part} is out of range; it must be at least {low:g}{upto}.")
        found.append(value)
    return list(dict.fromkeys(found))


def positive(value: int, what: str) -> int:
    """A count of at least one. Raises ConfigError."""
    if value < 1:
        raise ConfigError(f"--{what} {value} is out of range; it must be at least 1.")
    return value
