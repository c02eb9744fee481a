"""YAML and JSON files as plain data in which every value knows its line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import EvaluationError

Where = tuple[str | int, ...]
PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class FileError(EvaluationError):
    """A file that says something it should not; the message starts with file and line."""


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


class _Loader(yaml.SafeLoader):
    """YAML without dates: `2024-01-01` stays text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(path: Path) -> Located:
    """Read a YAML or JSON file safely. Raises FileError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read ({type(error).__name__}).") from error
    return parse(text, str(path))


def parse(text: str, file: str) -> Located:
    """Data and lines of a YAML or JSON text. Raises FileError."""
    loader = _Loader(text)
    lines: dict[Where, int] = {}
    try:
        node = loader.get_single_node()
        data = None if node is None else _build(loader, node, (), lines, file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = (error.problem or "it cannot be read").split("\n")[0]
        raise FileError(f"{file}:{line}: this is not valid YAML or JSON: {problem}.") from error
    except yaml.YAMLError as error:
        raise FileError(f"{file}:1: this is not valid YAML or JSON: {str(error).splitlines()[0]}.") from error
    finally:
        loader.dispose()
    return Located(file, data, lines)


def _build(loader: _Loader, node: yaml.Node, where: Where, lines: dict[Where, int], file: str) -> Any:
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.CollectionNode) and node.tag not in PLAIN:
        raise FileError(f"{file}:{node.start_mark.line + 1}: this is not valid YAML here: the tag {node.tag!r}.")
    if isinstance(node, yaml.MappingNode):
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise FileError(f"{file}:{line}: the key {key!r} is not text.")
            if key in made:
                raise FileError(f"{file}:{line}: {key!r} is set twice.")
            here = (*where, key)
            lines[here] = line
            made[key] = _build(loader, value_node, here, lines, file)
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*where, n), lines, file) for n, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)
