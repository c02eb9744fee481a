"""The journal of a run: a line of JSON for every finished cell, kept by one process at a time."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfpatch.files.file_lock import FileLock
from hfpatch.files.json_text import load_json

from ..errors import EvaluationError, FileError

JOURNAL = "cells.jsonl"
HEAD, CELL = b'{"run": ', b'{"cell": '


def json_bytes(data: Any) -> bytes:
    """A line of JSON in UTF-8; what UTF-8 cannot hold is escaped."""
    return (json.dumps(data, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@dataclass
class Journal:
    """Append-only file of finished cells; survives being killed at any moment.

    The first line tells which run it belongs to. A last line that a crash has torn is dropped, its cell is run again;
    a file damaged in any other way is left as it is and refused.
    """

    path: Path
    run: dict[str, Any]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = FileLock(self.path)
        self._empty = self._ends = True
        self._kept: int | None = None  # bytes, once they have been read

    def open(self) -> "Journal":
        """Read what is there and keep others from writing until `close`, or the end of this object or process.

        Raises EvaluationError when another has it open or it belongs to another run, FileError when it is damaged.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise EvaluationError(f"The folder {str(self.path.parent)!r:.200} cannot be made ({reason}).") from error
        if not self._lock.take():
            raise EvaluationError(
                f"{self.path.parent} is in use by another run; wait until it ends, or choose another --out."
            )
        try:
            return self._read()
        except BaseException:
            self.close()
            raise

    def read(self) -> "Journal":
        """As `open`, of a journal that another process keeps: nothing is written."""
        return self._read()

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the file. Raises EvaluationError when another has it open."""
        if not self._lock.take():
            raise EvaluationError(f"{self.path.parent} is in use by another run, which --fresh would destroy.")
        self.path.unlink(missing_ok=True)
        self.close()

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Note a finished cell; on disk when this returns. Raises EvaluationError."""
        line = {"cell": key, **record}
        self._append((json_bytes({"run": self.run}) if self._empty else b"") + json_bytes(line))
        self._empty = False
        self.done[key] = line

    def problem(self, key: str, reason: str) -> FileError:
        """An error about the line of a cell."""
        return self._damaged(self.lines.get(key, 1), reason)

    def _append(self, text: bytes) -> None:
        """Write after the last whole line; what a crash has left of one is cut off, and one without its end ended."""
        text = text if self._ends else b"\n" + text
        with self.path.open("ab", buffering=0) as file:
            kept = file.truncate(self._kept)
            try:
                if file.write(text) < len(text):
                    raise OSError(28, "No space left on device")
                os.fsync(file.fileno())
                self._kept, self._ends = kept + len(text), True
            except BaseException as error:
                file.truncate(kept)  # half a line would make the next one unreadable
                if not isinstance(error, OSError):
                    raise
                raise EvaluationError(
                    f"{self.path} cannot be written ({error.strerror}); start again, all cells in it are kept."
                ) from error

    def _read(self) -> "Journal":
        try:
            raw = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise EvaluationError(f"{self.path} cannot be read ({error.strerror}).") from error
        *whole, tail = raw.split(b"\n")
        torn = bool(tail) and self._torn(tail, CELL if whole else HEAD)
        if tail and not torn:
            whole.append(tail)
        data = [self._line(n, text) for n, text in enumerate(whole, 1)]
        if data:
            self._check_head(data[0])
        self.done, self.lines, self._empty = {}, {}, not data
        for n, line in enumerate(data[1:], 2):
            self._check_cell(n, line)
            self.done[line["cell"]], self.lines[line["cell"]] = line, n
        self._kept = len(raw) - len(tail) if torn else len(raw)
        self._ends = torn or not tail
        return self

    @staticmethod
    def _torn(tail: bytes, start: bytes) -> bool:
        """Whether this is what a crash leaves of a line: its beginning, or that and zeros."""
        try:
            load_json(tail.decode("utf-8"))
        except ValueError:
            left = tail.rstrip(b"\0")
            return left.startswith(start) or start.startswith(left)
        return False

    def _line(self, number: int, text: bytes) -> Any:
        try:
            return load_json(text.decode("utf-8"))
        except ValueError as error:
            raise self._damaged(number, str(error)) from error

    def _check_head(self, line: Any) -> None:
        if not isinstance(line, dict) or not isinstance(line.get("run"), dict):
            raise self._damaged(1, "it does not name a run")
        mine, theirs = (json.dumps(run, sort_keys=True) for run in (self.run, line["run"]))
        if mine != theirs:
            raise EvaluationError(
                f"{self.path.parent} holds a run with other arguments; choose another --out, or --fresh to replace it."
            )

    def _check_cell(self, number: int, line: Any) -> None:
        if not isinstance(line, dict) or not isinstance(line.get("cell"), str):
            raise self._damaged(number, "it names no cell")
        if line["cell"] in self.lines:
            raise self._damaged(number, f"it repeats the cell of line {self.lines[line['cell']]}")
        for name, fits in FIELDS.items():
            if name in line and not fits(line[name]):
                raise self._damaged(number, f"its {name!r} is not what a run writes")

    def _damaged(self, number: int, reason: str) -> FileError:
        return FileError(
            f"{self.path}:{number}: this line was not written by a run ({reason}); mend it, or forget all cells "
            "with --fresh."
        )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


FIELDS = {
    "data": lambda v: isinstance(v, dict),
    "samples": lambda v: isinstance(v, list) and all(isinstance(s, dict) for s in v),
    "seconds": _finite,
    "model": lambda v: isinstance(v, dict),
}
