"""What an interrupted training goes on from: one file, replaced as a whole."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

STATE_FILE = "training.pt"


def save_state(folder: Path, data: dict[str, Any]) -> None:
    """Write the state, so that a reader finds the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (STATE_FILE + ".new")
    torch.save(data, temporary)
    temporary.replace(folder / STATE_FILE)


def load_state(folder: Path, fields: Collection[str], device: Any = None) -> dict[str, Any] | None:
    """The state, None if there is none. Raises ConfigError when it cannot be read or lacks one of `fields`."""
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    try:
        data = torch.load(file, weights_only=True, map_location=device)
    except Exception as error:  # whatever a damaged file makes of the loader
        raise ConfigError(f"{file} is damaged ({type(error).__name__}); begin anew with --fresh.") from error
    if not isinstance(data, dict) or not set(fields) <= set(data):
        raise ConfigError(f"{file} was not written by this training; use another folder, or --fresh.")
    return data


@contextmanager
def of_this_model(folder: Path) -> Iterator[None]:
    """A block that puts a state into modules. Raises ConfigError where it does not fit them."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder} holds a run of another model; use another folder, or --fresh.") from error
