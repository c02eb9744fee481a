"""What a job has found, as plain data: a table, a plot, numbers. Terminal and page render the same view."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..run.stats import memory_text, time_text, tokens
from ..run.variants import DENSE

Row = Mapping[str, Any]
LENGTH = "prompt length (tokens)"


@dataclass(frozen=True)
class TableCell:
    """A text, what stands small beside or below it, and a mark: "good", "bad" or nothing."""

    text: str
    small: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of texts or TableCells under a header; a line is drawn above the rows in `rules`."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | TableCell]]
    rules: Collection[int] = ()

    @property
    def cells(self) -> list[list[TableCell]]:
        """All rows, texts as TableCells."""
        return [[TableCell(c) if isinstance(c, str) else c for c in row] for row in self.rows]


@dataclass(frozen=True)
class Series:
    """A line of a plot; `low` and `high` are the ends of its error bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes; `styles` names what drawn-through and dashed lines are."""

    series: Sequence[Series]
    label: str
    title: str = ""
    percent: bool = False
    log: bool = False
    from_zero: bool = False
    baseline: float | None = None
    styles: tuple[str, str] | None = None


@dataclass(frozen=True)
class Lines:
    """Panels side by side; `lengths`: x counts tokens of the prompt, on a logarithmic axis."""

    panels: Sequence[Panel]
    x_label: str = LENGTH
    lengths: bool = True
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A value with the ends of its error bar."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """Groups of horizontal bars, each with its title; values are written in the format `form`."""

    groups: Mapping[str, Sequence[Bar]]
    label: str
    form: str = ".0%"
    baseline: float | None = None
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A panel of shares per name: `(depth, length)` -> share."""

    panels: Mapping[str, Mapping[tuple[float, int], float]]
    label: str
    x_label: str = LENGTH
    y_label: str = "needle depth (% of the haystack)"
    note: str = ""


Plot = Lines | Bars | HeatMap


@dataclass(frozen=True)
class Unit:
    """How numbers are written and which way is better; changes are in `points` of a hundred or in percent."""

    show: Callable[[float], str]
    more_is_better: bool = False
    points: bool = False


SHARE = Unit(lambda value: f"{value:.1%}", more_is_better=True, points=True)
SECONDS, BYTES = Unit(time_text), Unit(memory_text)
PLAIN = Unit(lambda value: f"{value:.3f}")


@dataclass(frozen=True)
class Number:
    """What `compare` compares: a measure of a variant at a length or task, `low` to `high` where it has a spread."""

    what: str
    variant: str
    at: str
    value: float
    unit: Unit
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Aspect:
    """A column of a run's first table, to which every job may add.

    `says(own, dense, clear)` puts it into words; `stands_out`, for ratios to dense, what a variant does whose ratio is
    good; `longest`: prompts of the greatest length count, instead of the mean of all.
    """

    name: str
    meaning: str
    show: Callable[[float], str]
    says: Callable[[float, float, bool], str]
    stands_out: str = ""
    more_is_better: bool = True
    longest: bool = False


@dataclass(frozen=True)
class Answer:
    """A value of an aspect, what stands small beside it, and whether it is `clear` or within the noise."""

    aspect: Aspect
    variant: str
    value: float
    length: int = 0
    clear: bool = True
    small: str = ""


@dataclass(frozen=True)
class View:
    """All that is shown of a job: what it is called, what it means, a table, a plot, and its numbers."""

    title: str
    meaning: str
    table: Table
    plot: Plot
    numbers: Sequence[Number]
    notes: Sequence[str] = ()
    answers: Sequence[Answer] = ()


def heading(title: str, entry: Row) -> str:
    """The title, with the job's label where that says more."""
    known = entry["label"] in (entry["kind"], title.split()[-1])
    return title if known else f"{title} ({entry['label']})"


def names_of(rows: Sequence[Row]) -> list[str]:
    """Variants in the order they come."""
    return list(dict.fromkeys(r["variant"] for r in rows))


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """Prompt lengths, the short ones first."""
    return sorted({r["length"] for r in rows})


def of_variant(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of a variant, the short prompts first."""
    return sorted((r for r in rows if r["variant"] == name), key=lambda r: r["length"])


def new_lengths(rows: Sequence[Row]) -> list[int]:
    """Where in rows that are sorted by length another length begins."""
    return [n for n in range(1, len(rows)) if rows[n]["length"] != rows[n - 1]["length"]]


def tone(value: float, more_is_better: bool = True) -> str:
    """The mark of a ratio to dense: 5 % are something."""
    if not more_is_better:
        return "good" if value <= 0.95 else "bad" if value >= 1.05 else ""
    return "good" if value >= 1.05 else "bad" if value <= 0.95 else ""


def ratio(value: float, clear: bool = True) -> str:
    """A ratio to dense, with ~ where it is within the noise."""
    return f"{'' if clear else '~'}{value:.2f}"


def at_length(row: Row) -> str:
    """The row's prompt length as people write it."""
    return tokens(row["length"])


def is_clear(row: Row, measure: str) -> bool:
    """Whether a measure of a variant is apart from dense's; dense itself always is."""
    return bool(row[f"{measure}_clear"]) or row["variant"] == DENSE
