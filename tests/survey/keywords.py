"""The keywords attention gets, in a checked-in list, and what a new release of Transformers does to it.

`python -m survey.keywords` in tests/ writes the list anew: `read` from the sources by model folder, `recorded` by type
while tiny models run a prompt and one token. "forward" is what an attention module is handed, "call" what it hands to
the attention function besides queries, keys, values and mask.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from .build import CAUSAL, build
from .oracle import interface
from .pool import run_all
from .record import Recorder
from .scenario import prefill
from .session import Session
from .sources import Names, read_sources

PATH = Path(__file__).with_name("keywords.json")
COMMAND = "python -m survey.keywords"
PLACES = {"forward": "attention modules are handed", "call": "attention functions are handed"}
_SHOWN = 8


def record(name: str) -> Names | str:
    """What the attention modules of one type are handed and hand on; a string says why there is nothing."""
    try:
        model = build(name)
    except Exception as error:
        return f"not built: {type(error).__name__}"
    handed: dict[nn.Module, set[str]] = {}
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda m, a, k: handed.setdefault(m, set()).update(_names(m, a, k)), with_kwargs=True
        )
    seen, session, ids = Recorder(), Session(model), prefill().ids
    with interface(seen.wrap):
        try:
            session.feed(ids[:, :-1])
            session.feed(ids[:, -1:])
        except Exception:  # no cache, or pictures wanted: what has been seen until then counts
            pass
    modules = {call.module for call in seen.calls}
    return {
        "forward": " ".join(sorted(set().union(*(handed.get(m, set()) for m in modules)))),
        "call": " ".join(sorted({k for call in seen.calls for k in call.keywords})),
    }


def _names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Names of what a forward is handed, by position or by keyword."""
    return {*kwargs, *(p for p, _ in zip(inspect.signature(module.forward).parameters, args, strict=False))}


def record_all(workers: int = 2) -> dict[str, Names]:
    """All causal types that can be built and have attention calls."""
    found = {name: got for name, got in run_all(record, list(CAUSAL), workers) if isinstance(got, dict)}
    return {name: found[name] for name in sorted(found) if found[name]["call"]}


def release(version: str = transformers.__version__) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def saved() -> dict[str, Any]:
    """The checked-in list."""
    return json.loads(PATH.read_text())


def differences(old: dict[str, Names], new: dict[str, Names]) -> list[str]:
    """What `new` has and `old` has not, and the other way round, in sentences; new types alone are no difference."""
    out: list[str] = []
    for place, words in PLACES.items():
        before, after = _by_keyword(old, place), _by_keyword(new, place)
        for keyword in sorted(before.keys() | after.keys()):
            was, now = before.get(keyword, set()), after.get(keyword, set())
            if not was:
                out.append(f"{words} a new keyword, {keyword}, in {_some(now)}")
            elif not now:
                out.append(f"{words} {keyword} no longer; it was in {_some(was)}")
            else:
                grown, shrunk = (now - was) & old.keys(), (was - now) & new.keys()
                out += [f"{words} {keyword} now in {_some(grown)} as well"] if grown else []
                out += [f"{words} {keyword} no longer in {_some(shrunk)}"] if shrunk else []
    return out


def _by_keyword(types: dict[str, Names], place: str) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for name, names in types.items():
        for keyword in names[place].split():
            out.setdefault(keyword, set()).add(name)
    return out


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def write(workers: int = 2) -> None:
    """Write the list for the installed release, one type a line."""
    major, minor = release()
    parts = [f'"transformers": "{major}.{minor}"']
    for title, types in (("read", read_sources()), ("recorded", record_all(workers))):
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(names)}" for name, names in types.items())
        parts.append(f'"{title}": {{\n{rows}\n  }}')
    PATH.write_text("{\n  " + ",\n  ".join(parts) + "\n}\n")


if __name__ == "__main__":
    write()
