"""YAML read as plain data: text, numbers, truth values, lists and mappings, in bounded work."""

import re
from bisect import bisect_left
from typing import Any

import yaml
from yaml.reader import Reader

from ..errors import FileError

Where = tuple[str | int, ...]
DEEPEST, MOST_VALUES, LONGEST_NUMBER = 50, 50_000, 100
TOO_MANY = f"it holds more than {MOST_VALUES:,} values"
TAG = "tag:yaml.org,2002:"
COLLECTIONS = (f"{TAG}map", f"{TAG}seq")
SCALARS = {f"{TAG}str": "text", f"{TAG}int": "a whole number", f"{TAG}float": "a number",
           f"{TAG}bool": "true or false", f"{TAG}null": "null"}  # fmt: skip
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """YAML without dates: `2024-01-01` stays text. Stops at too many values."""

    composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        if self.composed > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=TOO_MANY, problem_mark=self.get_mark())
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != f"{TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class PlainYaml:
    """One YAML or JSON text: its data, and the line of every key and value by its place in the data."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file
        self.lines: dict[Where, int] = {}
        self._ends = [m.start() for m in re.finditer("\n", text)]
        self._values = 0

    def data(self) -> Any:
        """The data; None for an empty text. Raises FileError."""
        if found := Reader.NON_PRINTABLE.search(self.text):
            raise self._error(found.start(), f"it holds the character U+{ord(found[0]):04X}")
        loader = _Loader(self.text)
        try:
            node = loader.get_single_node()
            return None if node is None else self._build(loader, node, (), set())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            told = (error.problem or "it cannot be read").split("\n")[0]
            raise self._error(mark.index if mark else 0, told) from error
        except RecursionError as error:
            raise self._error(loader.index, "it is nested too deeply") from error
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: codes and versions out of range
            raise self._error(loader.index, str(error).split("\n")[0]) from error
        finally:
            loader.dispose()

    def _error(self, index: int, problem: str) -> FileError:
        return FileError(f"{self.file}:{self._line(index)}: this is not valid YAML or JSON: {problem:.200}.")

    def _wrong(self, node: yaml.Node, problem: str) -> FileError:
        return FileError(f"{self.file}:{self._line(node.start_mark.index)}: {problem}")

    def _at(self, where: Where, problem: str) -> FileError:
        """An error at a place of the data, as an alias does not stand where its node does."""
        return FileError(f"{self.file}:{self.lines.get(where, 1)}: {problem}")

    def _line(self, index: int) -> int:
        return bisect_left(self._ends, index) + 1

    def _build(self, loader: _Loader, node: yaml.Node, where: Where, above: set[int]) -> Any:
        self.lines.setdefault(where, self._line(node.start_mark.index))
        self._values += 1
        if self._values > MOST_VALUES:
            raise self._at(where[:1], f"{TOO_MANY}, those of aliases counted.")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(loader, node)
        if node.tag not in COLLECTIONS:
            raise self._wrong(node, f"this is not valid YAML here: the tag {node.tag!r:.80}.")
        if id(node) in above:
            raise self._at(where, "this refers to itself.")
        if len(where) >= DEEPEST:
            raise self._at(where[:1], f"this is nested too deeply; {DEEPEST} levels are the most.")
        above.add(id(node))
        made = self._mapping(loader, node, where, above) if isinstance(node, yaml.MappingNode) else [
            self._build(loader, item, (*where, n), above) for n, item in enumerate(node.value)
        ]  # fmt: skip
        above.discard(id(node))
        return made

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, where: Where, above: set[int]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{TAG}merge":
                raise self._wrong(key_node, "merge keys ('<<') are not read here; write out what they stand for.")
            key = self._scalar(loader, key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self._wrong(key_node, f"the key {self._shown(key_node)} is not text.")
            if key in made:
                raise self._wrong(key_node, f"{key!r:.60} is set twice.")
            here = (*where, key)
            self.lines[here] = self._line(key_node.start_mark.index)
            made[key] = self._build(loader, value_node, here, above)
        return made

    def _scalar(self, loader: _Loader, node: yaml.ScalarNode) -> Any:
        kind = SCALARS.get(node.tag)
        if kind is None:
            raise self._wrong(node, f"this is not valid YAML here: the tag {node.tag!r:.80}.")
        if node.tag == f"{TAG}str":
            if found := UNPRINTABLE.search(node.value):
                raise self._wrong(node, f"this text holds the character U+{ord(found[0]):04X}; leave it out.")
            return node.value
        if len(node.value) > LONGEST_NUMBER:
            raise self._wrong(node, f"{self._shown(node)} is too long for {kind}.")
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise self._wrong(node, f"{self._shown(node)} is not {kind}.") from error

    @staticmethod
    def _shown(node: yaml.Node) -> str:
        return f"{node.value!r:.40}" if isinstance(node, yaml.ScalarNode) else "given here"
