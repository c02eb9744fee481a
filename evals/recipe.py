"""Recipe files: found by name, read safely, checked against the schema with line numbers."""

import copy
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hfpatch.recipes
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from .errors import EvaluationError
from .located import Located, Where, parse, read
from .variants import parse_value

FOLDER = Path(hfpatch.recipes.__file__).parent
KINDS = {"array": "a list", "object": "a mapping", "string": "text", "integer": "a whole number", "number": "a number",
         "boolean": "true or false", "null": "null"}  # fmt: skip


def list_recipes() -> dict[str, str]:
    """Names of the shipped recipes and the question each answers."""
    return {p.stem: str(read(p).data.get("about", "")) for p in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one. Raises EvaluationError."""
    path = Path(name)
    if path.is_file():
        return path
    known = {p.stem: p for p in FOLDER.glob("*.yaml")}
    if path.stem in known and path.suffix in ("", ".yaml", ".yml"):
        return known[path.stem]
    near = get_close_matches(path.stem, known, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"shipped are {', '.join(sorted(known))}."
    raise EvaluationError(f"There is no recipe {name!r}; {hint}")


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
    schema = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    problems = []
    for error in Draft202012Validator(schema).iter_errors(found.data):
        where, sentence = _explain(error)
        problems.append((found.lines.get(where, 0), where, sentence))
    if problems:
        _, where, sentence = min(problems, key=lambda p: (p[0], [str(w) for w in p[1]]))
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


def _name(where: Where) -> str:
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text or "the recipe"


def _explain(error: ValidationError) -> tuple[Where, str]:
    """Where a schema error is, and a sentence about it."""
    where, kind, value, wanted = tuple(error.absolute_path), error.validator, error.instance, error.validator_value
    name, shown = _name(where), f"{json.dumps(error.instance, ensure_ascii=False, default=str):.60}"
    if kind == "additionalProperties":
        known = sorted(error.schema["properties"])
        unknown = next(k for k in value if k not in known)
        near = get_close_matches(unknown, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"settings here are {', '.join(known)}."
        return (*where, unknown), f"there is no setting {unknown!r}; {hint}"
    if kind == "required":
        missing = next(k for k in wanted if k not in value)
        return where, f"{name} needs {missing!r}."
    if kind == "type":
        kinds = [wanted] if isinstance(wanted, str) else list(wanted)
        return where, f"{name} must be {' or '.join(KINDS[k] for k in kinds)}, not {shown}."
    if kind == "enum":
        return where, f"{name} is {shown}; it must be one of {', '.join(map(str, wanted))}."
    if kind == "const":
        return where, f"{name} is {shown}; it must be {wanted!r}" + (" or a list." if where == ("variants",) else ".")
    if kind in ("minimum", "maximum"):
        return where, f"{name} is {shown}; it must be at {'least' if kind == 'minimum' else 'most'} {wanted}."
    if kind in ("minItems", "minLength"):
        return where, f"{name} is empty."
    if kind == "uniqueItems":
        return where, f"{name} names something twice."
    if kind == "pattern":
        return where, f"{name} is {shown}; it may hold letters, digits, '-', '_' and '.'."
    return where, f"{name}: {error.message}."


def _override(found: Located, text: str) -> None:
    """Apply `model=x`, `tasks.0.samples=2` or `niah.samples=2` (a job's label, task or measure)."""
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise EvaluationError(f"--set {text!r} is not of the form name=value, such as model=embedded.")
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
        raise EvaluationError(f"--set {text!r}: {last!r} cannot be set there.")


def _steps(data: dict[str, Any], path: str) -> list[str]:
    head, *rest = path.split(".")
    if head in data or not rest:
        return [head, *rest]
    for group, kind in (("tasks", "task"), ("measures", "measure")):
        for n, job in enumerate(data.get(group, [])):
            if head in (job.get("label"), job[kind]):
                return [group, str(n), *rest]
    return [head, *rest]


def _child(at: Any, step: str, text: str) -> Any:
    if isinstance(at, list) and step.isdigit() and int(step) < len(at):
        return at[int(step)]
    if isinstance(at, dict) and step in at:
        return at[step]
    raise EvaluationError(f"--set {text!r}: there is no {step!r} in this recipe.")


def _value(text: str) -> Any:
    text = text.strip()
    return parse(text, "--set").data if text.startswith(("[", "{")) else parse_value(text)
