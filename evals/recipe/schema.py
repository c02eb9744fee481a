"""The schema of recipes: what stands in schema.json by hand, and the settings of every kind of job from its file.

`make schema` brings the file up to date, for editors.
"""

import json
from typing import Any

from ..jobs.registry import GROUPS, job_kinds
from ..schema import FOLDER, by_kind, load_schema

NAME = "schema.json"


def recipe_schema() -> dict[str, Any]:
    """The whole schema, with every kind of job there is now."""
    schema = load_schema(NAME)
    kinds = job_kinds()
    schema["$defs"]["kinds"] = {name: cls.settings_schema() for name, cls in kinds.items()}
    for group in GROUPS:
        own = {name: {"$ref": f"#/$defs/kinds/{name}"} for name, cls in kinds.items() if cls.group == group}
        others = [own.pop(name) for name in list(own) if kinds[name].takes_any_name]
        name = {"type": "string", "minLength": 1} if others else {"enum": list(own)}
        schema["$defs"][f"any_{group}"] = {
            "type": "object", "required": [group], "properties": {group: name},
            "allOf": by_kind(group, own, others[0] if others else None),
        }  # fmt: skip
    return schema


def whole_text() -> str:
    """What the file should hold."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def write() -> None:
    """Bring the file up to date."""
    (FOLDER / NAME).write_text(whole_text(), encoding="utf-8")
