"""Folders that commands write to, tried before the work begins and left as they were when refused; whole files."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .file_lock import FileLock


@contextmanager
def writable(folder: str | Path, files: Sequence[str] = ()) -> Iterator[None]:
    """A block that writes `files` to `folder`, which is made; taken away again, if empty, when the block fails.

    Raises ConfigError at once when that cannot be.
    """
    folder = Path(folder)
    made = _missing(folder)
    try:
        _try(folder, files)
        yield
    except BaseException:
        _remove(made)
        raise


@contextmanager
def own_folder(folder: str | Path, files: Sequence[str] = ()) -> Iterator[None]:
    """As `writable`, for a block that must not share the folder with another process. Raises ConfigError."""
    with writable(folder, files):
        lock = FileLock(Path(folder) / "calibration")
        if not lock.take():
            raise ConfigError(f"Another process writes to {folder}; wait for it, or choose another --out.")
        try:
            yield
        finally:
            lock.release()


def _missing(folder: Path) -> list[Path]:
    """The folders that would have to be made, innermost first."""
    return [path for path in (folder, *folder.parents) if not os.path.exists(path)]


def _try(folder: Path, files: Sequence[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a few bytes")
            file.flush()
        taken = [name for name in files if (folder / name).is_dir()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot write to {str(folder)!r:.200} ({reason}); choose another --out.") from error
    if taken:
        raise ConfigError(f"Cannot write {taken[0]} to {folder}, where a folder has that name; choose another --out.")


def _remove(made: Sequence[Path]) -> None:
    for path in made:
        if os.path.isdir(path):
            try:
                path.rmdir()
            except OSError:  # no longer empty
                return


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, atomically; what UTF-8 cannot hold is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
