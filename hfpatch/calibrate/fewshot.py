"""Classification prompts from texts and their labels: a few labelled ones in front, the same for many questions."""

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, reason
from ..files.json_text import json_lines
from ..text.labelled import TASKS

CONTENT_FREE = ("N/A", "[MASK]", "")
DRAWS = 2
TABLES = (".csv", ".tsv")
PLAIN = "{text}"
Row = Mapping[str, Any]


def task_prompts(name: str, count: int, shots: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` questions of a task of `hfpatch.text.labelled`. Raises ConfigError."""
    task = TASKS[name]
    rows = [{"text": text, "label": label} for text, label in task.rows(count + DRAWS * shots, seed)]
    return fewshot_prompts(rows, f"Text: {PLAIN}\n{task.cue}", "label", shots, count, intro=task.instruction)


def file_rows(path: Path) -> list[Row]:
    """The rows of a table with a header (CSV, TSV) or of JSON lines. Raises ConfigError."""
    if path.suffix not in TABLES:
        return [row for _, row in json_lines(path)]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as a table ({reason(error)}); give a UTF-8 file.") from error


def fewshot_prompts(
    rows: Sequence[Row], template: str, answer: str, shots: int, count: int, *, names: Sequence[str] = (),
    intro: str = "", seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """At most `count` prompts about `rows`, each after one of a few draws of `shots` other rows with their labels.

    `template` fills in a row's fields and ends before the label, which stands in the field `answer`; `names` are
    labels by number. `blanks` are the same prompts about nothing (contextual calibration, arXiv 2102.09690). Raises
    ConfigError.
    """
    if not rows:
        raise ConfigError("The table has no rows; it needs a line of names and then a row per text.")
    told = [(_filled(template, row), _label(row, answer, names)) for row in rows]
    labels = sorted({label for _, label in told})
    rng = random.Random(f"fewshot-{seed}")
    left = list(range(len(rows)))
    rng.shuffle(left)
    heads = []
    for _ in range(min(DRAWS, max(1, len(rows) // (4 * max(shots, 1))))):
        shown = [told[_take(left, told, labels[n % len(labels)])] for n in range(shots)]
        rng.shuffle(shown)
        parts = [intro] if intro else []
        heads.append("".join(f"{part}\n\n" for part in [*parts, *(f"{text}{label}" for text, label in shown)]))
    nothing = [_filled(template, dict.fromkeys(rows[0], free)) for free in CONTENT_FREE]
    return [
        {
            "prompt": heads[n % len(heads)] + told[row][0],
            "answer": told[row][1],
            "labels": labels,
            "blanks": [heads[n % len(heads)] + blank for blank in nothing],
        }
        for n, row in enumerate(left[:count])
    ]


def _take(left: list[int], told: Sequence[tuple[str, str]], label: str) -> int:
    """Take the next row of a label, or any where none is left."""
    if not left:
        raise ConfigError("There are too few rows for so many labelled texts per prompt; lower --shots.")
    at = next((n for n, row in enumerate(left) if told[row][1] == label), 0)
    return left.pop(at)


def _filled(template: str, row: Row) -> str:
    try:
        return template.format(**row)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"The prompt {template!r:.200} cannot be filled from a row with {', '.join(map(str, row))}; "
            "write --prompt with these names in braces."
        ) from error


def _label(row: Row, answer: str, names: Sequence[str]) -> str:
    if row.get(answer) is None or str(row[answer]).strip() == "":
        raise ConfigError(f"A row has no {answer!r}; name the field of the label with --answer.")
    value = str(row[answer]).strip()
    if not names:
        return f" {value}"
    if not value.isdecimal() or int(value) >= len(names):
        raise ConfigError(f"The label {value!r:.50} is not a number below {len(names)}, as --names says.")
    return names[int(value)]
