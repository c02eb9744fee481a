"""Files of a run: results.json with where and how it was made, and the journal of finished cells."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hfpatch

from .errors import EvaluationError

RESULTS, SAMPLES, JOURNAL = "results.json", "samples.jsonl", "cells.jsonl"
PACKAGES = ("torch", "transformers", "accelerate", "lm_eval", "datasets", "numpy", "triton", "flash-attn")


def versions() -> dict[str, str]:
    """Versions of hfpatch and of the installed packages that matter to results."""
    found = {"hfpatch": hfpatch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the source tree hfpatch runs from, with `+` when it has changes; None outside a checkout."""
    root = Path(hfpatch.__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions, commit and hardware."""
    cuda = torch.cuda.is_available()
    return {
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "device": device or ("cuda" if cuda else "cpu"),
        "device_name": torch.cuda.get_device_name() if cuda and device != "cpu" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def load_average() -> float | None:
    """Processes waiting for a CPU, averaged over a minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run. Raises EvaluationError."""
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"There is no {RESULTS} in {folder}; name the folder a run has written to.") from error
    except ValueError as error:
        raise EvaluationError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict) or "jobs" not in data:
        raise EvaluationError(f"{path} was not written by hfpatch.")
    return data


@dataclass
class Journal:
    """Append-only file of finished cells; survives being killed at any moment.

    The first line tells which run it belongs to; a torn last line is dropped when it is opened.
    """

    path: Path
    run: dict[str, Any]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def open(self) -> "Journal":
        """Read what is there. Raises EvaluationError when it belongs to another run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._whole_lines()
        if lines and lines[0].get("run") != self.run:
            raise EvaluationError(
                f"{self.path.parent} holds a run with other arguments; choose another --out, or --fresh to replace it."
            )
        if not lines:
            self._append({"run": self.run})
        self.done = {line["cell"]: line for line in lines[1:]}
        return self

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Note a finished cell; on disk when this returns."""
        line = {"cell": key, **record}
        self._append(line)
        self.done[key] = line

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.decode("utf-8").splitlines()]
