"""Where a long reading stands, in a JSON file: written whole, and read as strictly as any file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import ConfigError, InputError
from ...files.json_text import read_json
from ...files.output import write_json
from ...values import Misfit, OutOfRange, fitted


@dataclass(frozen=True)
class Kept:
    """A sentence that was kept: its text, its character span in the context, its score in the last step."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class ItemState:
    """What has been read for one question; `weights` are those of its tokens, once they are known."""

    kept: list[Kept]
    path: list[dict[str, int]]
    weights: list[float] | None


def write_state(where: Path, run: dict[str, Any], offset: int, items: Sequence[ItemState]) -> None:
    """Replace the file: the run, the character to go on from, and what was kept for each question."""
    write_json(where, {"run": run, "offset": offset, "items": [asdict(item) for item in items]})


def read_state(where: Path, run: dict[str, Any]) -> tuple[int, list[ItemState]]:
    """Offset and items of the file, if it is of the same run. Raises InputError."""
    try:
        data = read_json(where)
        if not isinstance(data, dict) or not isinstance(data["run"], dict):
            raise Misfit
        if data["run"] != run:
            raise InputError(f"{where} belongs to other questions or settings; delete it or name another file.")
        offset, items = fitted(data["offset"], int), [_item(state) for state in fitted(data["items"], list[dict])]
        if offset < 0 or len(items) != len(run["questions"]):
            raise Misfit
    except (ConfigError, Misfit, OutOfRange, KeyError, TypeError) as error:
        raise InputError(f"{where} is not a reading state; delete it to start again.") from error
    return offset, items


def _item(state: dict[str, Any]) -> ItemState:
    hints = {"text": str, "start": int, "end": int, "score": float}
    kept = [Kept(**{f.name: fitted(k[f.name], hints[f.name]) for f in fields(Kept)}) for k in _dicts(state["kept"])]
    if any(not 0 <= k.start <= k.end for k in kept):
        raise Misfit
    path = [{str(name): fitted(n, int) for name, n in step.items()} for step in _dicts(state["path"])]
    return ItemState(kept, path, fitted(state["weights"], list[float] | None))


def _dicts(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise Misfit
    return value
