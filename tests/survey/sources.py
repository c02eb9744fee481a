"""Keywords of attention modules as Transformers' sources have them: nothing is imported, nothing is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name

from .build import CAUSAL

BASIC = ("query", "key", "value", "attention_mask")
Names = dict[str, str]
_TOP = re.compile(r"^(?=[^\s)\]}#])", re.M)
_LOOKUP = "get_interface"


def read_sources() -> dict[str, Names]:
    """By model folder: what attention modules' `forward` takes, and what they hand to the attention function."""
    root = Path(transformers.__file__).parent / "models"
    found: dict[str, Names] = {}
    for folder in sorted({model_type_to_module_name(name) for name in CAUSAL}):
        forward: set[str] = set()
        call: set[str] = set()
        for file in sorted((root / folder).glob("modeling_*.py")):
            for function in _lookups(file.read_text()):
                forward |= {a.arg for a in (*function.args.args[1:], *function.args.kwonlyargs)}
                call |= set(_handed(function))
        if forward:
            found[folder] = {"forward": " ".join(sorted(forward)), "call": " ".join(sorted(call))}
    return found


def _lookups(text: str) -> Iterator[ast.FunctionDef]:
    """Methods that look an attention function up; only classes that have one are parsed."""
    for piece in _TOP.split(text):
        if piece.startswith("class ") and f"{_LOOKUP}(" in piece:
            for node in ast.parse(piece).body[0].body:  # type: ignore[attr-defined]
                if isinstance(node, ast.FunctionDef) and _looks_up(node):
                    yield node


def _looks_up(node: ast.AST) -> bool:
    return any(isinstance(x, ast.Attribute) and x.attr == _LOOKUP for x in ast.walk(node))


def _handed(function: ast.FunctionDef) -> Iterator[str]:
    """Keywords of the calls of what was looked up; queries, keys, values and the mask are no news."""
    targets = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _looks_up(node.value):
            names = node.targets if isinstance(node, ast.Assign) else [node.target]
            targets |= {name.id for name in names if isinstance(name, ast.Name)}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in targets:
            yield from (k.arg for k in node.keywords if k.arg not in (None, *BASIC))
