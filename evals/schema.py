"""JSON Schemas read strictly: what is wrong with some data, in one sentence."""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hfpatch.recipes

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

Data = dict[str, Any]
Where = tuple[str | int, ...]
FOLDER = Path(hfpatch.recipes.__file__).parent
LARGEST = 1e100  # beyond it sums and products of a few numbers would not be numbers
KINDS = {"array": "a list", "object": "a mapping", "string": "text", "integer": "a whole number", "number": "a number",
         "boolean": "true or false", "null": "null"}  # fmt: skip


def problems(schema: Data, data: Any) -> Iterator[tuple[Where, str]]:
    """Where the data does not follow a schema, and a sentence about it."""
    return map(_explain, _validator(schema).iter_errors(data))


def first_problem(schema: Data, data: Any) -> str | None:
    """A sentence about the first place at which the data does not follow the schema."""
    return next((sentence for _, sentence in problems(schema, data)), None)


def load_schema(name: str) -> Data:
    """A schema file of this package, as data of one's own."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def by_kind(name: str, parts: Mapping[str, Data], others: Data | None = None) -> list[Data]:
    """For `allOf`: an object is held to the part of the kind its key `name` names, or else to `others`."""

    def when(test: Data, **what: Data) -> Data:
        return {"if": {"properties": {name: test}}, **what}

    chosen = [when({"const": kind}, then=part) for kind, part in parts.items()]
    return chosen if others is None else [*chosen, when({"enum": list(parts)}, **{"else": others})]


def _validator(schema: Data) -> "Validator":
    from jsonschema import Draft202012Validator, validators

    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_whole, "number": _is_number})
    strict = validators.extend(Draft202012Validator, {"uniqueItems": _unique}, type_checker=types)
    return strict(schema)


def _is_whole(checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # 1.0 would do for JSON, not for range()


def _is_number(checker: Any, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _unique(validator: "Validator", wanted: bool, value: Any, schema: Any) -> "Iterator[ValidationError]":
    from jsonschema.exceptions import ValidationError

    if not isinstance(value, list):
        return
    plain = {v if isinstance(v, int | float) else json.dumps(v, sort_keys=True) for v in value}
    if wanted and len(plain) < len(value):
        yield ValidationError("something is there twice")


def name_of(where: Where) -> str:
    """A place as people write it: `tasks[0].samples`."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else (f".{part:.60}" if text else f"{part:.60}")
    return text or "the file"


def _explain(error: "ValidationError") -> tuple[Where, str]:
    where, kind, value, wanted = tuple(error.absolute_path), error.validator, error.instance, error.validator_value
    name, shown = name_of(where), f"{json.dumps(value, ensure_ascii=False, default=str):.60}"
    if kind == "additionalProperties":
        known = sorted(error.schema["properties"])
        unknown = next(k for k in value if k not in known)
        near = get_close_matches(unknown, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"settings here are {', '.join(known)}."
        return (*where, unknown), f"there is no setting {unknown!r:.60}; {hint}"
    if kind == "required":
        missing = next(k for k in wanted if k not in value)
        return where, f"{name} needs {missing!r}."
    if kind == "type":
        kinds = [wanted] if isinstance(wanted, str) else list(wanted)
        return where, f"{name} must be {' or '.join(KINDS[k] for k in kinds)}, not {shown}."
    if kind == "not":
        return where, f"{name} must be a number, not {shown}."
    if kind == "enum":
        return where, f"{name} is {shown}; it must be one of {', '.join(map(str, wanted))}."
    if kind == "const":
        return where, f"{name} is {shown}; it must be {wanted!r}" + (" or a list." if where == ("variants",) else ".")
    if kind in ("minimum", "maximum"):
        return where, f"{name} is {shown}; it must be at {'least' if kind == 'minimum' else 'most'} {wanted}."
    if kind in ("minItems", "minLength"):
        return where, f"{name} is empty."
    if kind in ("maxItems", "maxLength"):
        return where, f"{name} is too long; it may have {wanted} {'items' if kind == 'maxItems' else 'characters'}."
    if kind == "uniqueItems":
        return where, f"{name} names something twice."
    if kind == "pattern":
        return where, f"{name} is {shown}; it may hold letters, digits, '-', '_' and '.'."
    return where, f"{name}: {error.message:.200}."
