"""YAML and JSON files as plain data in which every value knows its line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError as FileError
from .plain_yaml import PlainYaml
from .plain_yaml import Where as Where

MOST_BYTES = 1 << 19


@dataclass(frozen=True)
class Located:
    """Plain data and the line of every key and value, by its place in the data."""

    file: str
    data: Any
    lines: dict[Where, int]

    def error(self, where: Where, sentence: str) -> FileError:
        """An error at the nearest place that stands in the file."""
        while where and where not in self.lines:
            where = where[:-1]
        return FileError(f"{self.file}:{self.lines.get(where, 1)}: {sentence}")


def read(path: Path) -> Located:
    """Read a YAML or JSON file safely. Raises FileError with file and line."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise FileError(f"{str(path)!r:.200}: cannot be read ({type(error).__name__}).") from error
    if len(raw) > MOST_BYTES:
        raise FileError(f"{path}: this file is too long; it may have {MOST_BYTES:,} bytes.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path}:{line}: this is not UTF-8 text; save it as UTF-8.") from error
    return parse(text.replace("\r\n", "\n").replace("\r", "\n"), str(path))


def parse(text: str, file: str) -> Located:
    """Data and lines of a YAML or JSON text. Raises FileError."""
    found = PlainYaml(text, file)
    return Located(file, found.data(), found.lines)
