"""Files of a run: results.json with where and how it was made, and the journal of finished cells."""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hfpatch
from hfpatch.files.output import write_bytes
from hfpatch.files.output import write_json as write_json
from hfpatch.files.output import write_text as write_text

from .journal import JOURNAL as JOURNAL
from .journal import Journal as Journal
from .journal import json_bytes

RESULTS, SAMPLES = "results.json", "samples.jsonl"
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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
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


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_bytes(path, b"".join(map(json_bytes, rows)))
