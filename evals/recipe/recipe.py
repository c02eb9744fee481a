"""Recipe files: found by name, read safely, checked against the schema with line numbers."""

import copy
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hfpatch.files.located import Located, parse, read

from ..errors import EvaluationError
from ..jobs.registry import GROUPS
from ..run.variants import parse_value
from ..schema import FOLDER, problems
from .schema import recipe_schema


def list_recipes() -> dict[str, str]:
    """Names of the shipped recipes and the question each answers."""
    return {p.stem: str(read(p).data.get("about", "")) for p in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one. Raises EvaluationError."""
    path = Path(name)
    if os.path.isfile(path):  # whatever the name, where Path.is_file may raise
        return path
    known = {p.stem: p for p in FOLDER.glob("*.yaml")}
    if path.stem in known and path.suffix in ("", ".yaml", ".yml"):
        return known[path.stem]
    near = get_close_matches(path.stem, known, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"shipped are {', '.join(sorted(known))}."
    raise EvaluationError(f"There is no recipe {name!r:.200}; {hint}")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Located:
    """A recipe's data with its lines, `KEY.KEY=VALUE` overrides applied. Raises FileError."""
    found = read(path)
    if not isinstance(found.data, dict):
        raise found.error((), "a recipe is a mapping with at least 'model' and 'variants'.")
    validate(found)
    if not overrides:
        return found
    changed = Located(found.file, copy.deepcopy(found.data), dict(found.lines))
    for override in overrides:
        _override(changed, override)
        validate(Located(f"--set {override}", changed.data, {}), whole=False)
    return changed


def validate(found: Located, *, whole: bool = True) -> None:
    """Raise FileError at the first place, from the top, where the data does not follow the schema."""
    wrong = [(found.lines.get(where, 0), where, said) for where, said in problems(recipe_schema(), found.data)]
    if wrong:
        _, where, sentence = min(wrong, key=lambda p: (p[0], [str(w) for w in p[1]]))
        if not whole:
            raise EvaluationError(f"{found.file}: {sentence}")
        raise found.error(where, sentence)
    for n, variant in enumerate(found.data["variants"] if isinstance(found.data["variants"], list) else []):
        if ("patch" in variant) == ("methods" in variant):
            raise found.error(("variants", n), "a variant has either 'patch' or 'methods'.")
        if "settings" in variant and "methods" in variant:
            raise found.error(("variants", n, "settings"), "put settings beside each 'method' of 'methods'.")
    if "settings" in found.data and found.data["variants"] != "all":
        raise found.error(("settings",), "'settings' goes with 'variants: all'; put it into the variants instead.")
    if not (found.data.get("tasks") or found.data.get("measures")):
        raise found.error((), "there is nothing to do; add 'tasks' or 'measures'.")


def _override(found: Located, text: str) -> None:
    """Apply `model=x`, `tasks.0.samples=2` or `niah.samples=2` (a job's label, task or measure)."""
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise EvaluationError(f"--set {text!r:.200} is not of the form name=value, such as model=embedded.")
    at: Any = found.data
    *steps, last = _steps(found.data, path.strip())
    for step in steps:
        at = _child(at, step, text)
    if isinstance(at, list):
        _child(at, last, text)
        at[int(last)] = _value(value)
    elif isinstance(at, dict):
        at[last] = _value(value)
    else:
        raise EvaluationError(f"--set {text!r:.200}: {last!r:.200} cannot be set there.")


def _steps(data: dict[str, Any], path: str) -> list[str]:
    head, *rest = path.split(".")
    if head in data or not rest:
        return [head, *rest]
    for group in GROUPS:
        for n, job in enumerate(data.get(f"{group}s", [])):
            if head in (job.get("label"), job[group]):
                return [f"{group}s", str(n), *rest]
    return [head, *rest]


def _child(at: Any, step: str, text: str) -> Any:
    if isinstance(at, list) and step in map(str, range(len(at))):
        return at[int(step)]
    if isinstance(at, dict) and step in at:
        return at[step]
    raise EvaluationError(f"--set {text!r:.200}: there is no {step[:200]!r} in this recipe.")


def _value(text: str) -> Any:
    text = text.strip()
    return parse(text, "--set").data if text.startswith(("[", "{")) else parse_value(text)
