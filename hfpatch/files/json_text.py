"""JSON that people can edit, and lines of it: whatever is wrong with it is one ValueError."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, reason
from ..values import shown, shown_path

DEEPEST = 64
LONGEST_NUMBER = 100  # characters


def load_json(text: str) -> Any:
    """Data of a JSON text of moderate depth, without keys that are there twice. Raises ValueError with the reason."""
    try:
        data = json.loads(text, parse_int=_whole, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [data]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return data
    raise ValueError("it is nested too deeply")


def read_json(file: Path) -> Any:
    """What a JSON file in UTF-8 says, with or without a byte order mark. Raises ConfigError."""
    try:
        if file.exists() and not file.is_file():  # reading a device or a pipe may never end
            raise ConfigError(f"{shown_path(file)} is not a file.")
        return load_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{shown_path(file)} cannot be read ({reason(error)}).") from error
    except ValueError as error:
        raise ConfigError(f"{shown_path(file)} is not valid JSON: {reason(error)}.") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and data of every line of a file that is not blank. Raises ConfigError with file and line.

    Lines end at a line feed alone: answers of a model may hold any other of Unicode's separators.
    """
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r:.200} cannot be read as JSON lines ({getattr(error, 'strerror', error)})."
        ) from error
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, load_json(line.decode("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: this is no line of JSON ({error}).") from error


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise ValueError(f"{shown(twice)} is set twice")
    return made
