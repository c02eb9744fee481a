"""JSON files of other people, read strictly."""

import json
from pathlib import Path
from typing import Any

from .errors import ConfigError, reason
from .values import shown, shown_path


def read_json(file: Path) -> Any:
    """What a JSON file in UTF-8 says, with or without a byte order mark. Raises ConfigError.

    A name that is set twice in one object is an error: only one of the values would count.
    """
    try:
        if file.exists() and not file.is_file():  # reading a device or a pipe may never end
            raise ConfigError(f"{shown_path(file)} is not a file.")
        return json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except OSError as error:
        raise ConfigError(f"{shown_path(file)} cannot be read ({reason(error)}).") from error
    except RecursionError:
        raise ConfigError(f"{shown_path(file)} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise ConfigError(f"{shown_path(file)} is not valid JSON: {reason(error)}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is set twice")
        found[name] = value
    return found
