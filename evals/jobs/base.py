"""What every kind of job is: its settings with their schema, what it does, and a view of what it has found."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar

from ..run.cells import Cell, CellResult, Data, Session, Work
from ..run.variants import Variant
from .view import View

# Parts of schemas; those with $ref stand in recipes/schema.json.
LENGTHS, DEPTHS, HAYSTACK, COUNT = ({"$ref": f"#/$defs/{name}"} for name in ("lengths", "depths", "haystack", "count"))
NUMBER, WHOLE, TEXT, FLAG = ({"type": name} for name in ("number", "integer", "string", "boolean"))
POSITIVE = {"type": "integer", "minimum": 1}
FIGURE = {"not": {"type": ["string", "object", "array", "boolean", "null"]}}  # a number, finite or not


def setting(schema: Mapping[str, Any], default: Any = MISSING, help: str = "") -> Any:
    """A field of a job that recipes may set: its JSON Schema, its default, and what it means."""
    metadata = {"schema": {**schema, **({"description": help} if help else {})}}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def keys(may_have: Mapping[str, Data] | None = None, /, **properties: Data) -> Data:
    """The schema of an object with at least these keys, and with those of `may_have` if they are there."""
    return {"type": "object", "required": list(properties), "properties": {**properties, **(may_have or {})}}


class Job(ABC):
    """A kind of evaluation: a frozen dataclass of its settings, the last of them `label`, its name in a run.

    `group`: whether recipes list it under "task" or "measure"; `takes_any_name`: they call it by names that are no
    kind's; `timed`: it takes time or memory, so nothing else may run beside it; `row`: schema of its rows in
    results.json; `entry`: of what else its entry there needs.
    """

    kind: ClassVar[str]
    about: ClassVar[str]
    group: ClassVar[str] = "task"
    takes_any_name: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    row: ClassVar[Data]
    entry: ClassVar[Data] = {}
    lengths: Sequence[int] = ()
    label: str

    def check(self, cell: Cell, session: Session) -> None:  # noqa: B027
        """Raise EvaluationError where the model has no positions for a cell; asked of all before the first is run."""

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """What is done or not done: a cell per length and variant, the short ones first."""
        return [Cell(self.label, v.name, n) for n in sorted(self.lengths) for v in variants]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """How often `run` will call `session.step`."""
        return 1

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """What a cell takes, for estimates; None when that is not known."""
        return None

    @abstractmethod
    def run(self, cell: Cell, session: Session) -> CellResult:
        """Do one cell."""

    @abstractmethod
    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """Flat rows for results.json from what the cells have found, in their order."""

    def more(self, rows: Sequence[Data]) -> Data:
        """What else its entry in results.json holds."""
        return {}

    @classmethod
    @abstractmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """What its entry in results.json says; `decode_only` names the variants that act in decoding alone."""

    @classmethod
    def from_recipe(cls, name: str, settings: Data) -> "Job":
        """The job a recipe calls `name`."""
        return cls(**settings)

    def problem(self) -> tuple[tuple[str, ...], str] | None:
        """What is wrong with the settings beyond their schema: where, and a sentence."""
        return None

    def settings(self) -> Data:
        """The settings as plain data, the label aside."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "label"}  # type: ignore[arg-type]

    @classmethod
    def settings_schema(cls) -> Data:
        """The schema of its settings in recipes, from the fields."""
        own = [f for f in fields(cls) if f.name != "label"]  # type: ignore[arg-type]
        needed = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
        return {
            "description": cls.about,
            "additionalProperties": False,
            "required": list(dict.fromkeys([cls.group, *needed])),
            "properties": {
                cls.group: {"const": cls.kind}, "label": {"$ref": "#/$defs/label"},
                **{f.name: f.metadata["schema"] for f in own},
            },
        }  # fmt: skip

    @classmethod
    def entry_schema(cls) -> Data:
        """The schema of its entry in results.json."""
        properties = {**cls.entry.get("properties", {}), "rows": {"type": "array", "items": cls.row}}
        return {**cls.entry, "properties": properties}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
