"""Which room may import which; `docs/architecture.md` says why."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"hfpatch": ROOT / "hfpatch", "hfpatch.evals": ROOT / "evals"}
BASE = {"errors", "values", "version"}
CORE = {*BASE, "config", "core"}
PATCHING = {*CORE, "files", "ops", "runtime", "methods", "api", "text"}
ALL = {*PATCHING, "draw", "launch", "calibrate"}

ALLOWED = {
    "values": set(), "version": set(), "moved": set(), "errors": {"values"}, "launch": {"errors"},
    "files": BASE, "text": BASE,
    "core": CORE,
    "config": {*CORE, "files", "methods"},  # the registry names the package in which methods lie
    "ops": {"core", "errors"},
    "runtime": {*CORE, "ops"},
    "methods": PATCHING,
    "drives": {"core", "errors"}, "handle": {*CORE, "drives", "runtime"}, "api": {*CORE, "handle", "runtime"},
    "public": {*CORE, "api"}, "": {"moved", "public", "version"},
    "draw": {*PATCHING}, "calibrate": {*ALL, "cli"},
    "integrations": {*ALL, "public", ""}, "cli": {*ALL, "integrations", "evals"},
    "__main__": {"cli"},
}  # fmt: skip
LATE = {  # within functions, once a command has been given
    ("calibrate", "evals"), ("integrations", "evals"), ("drives", "methods"),
}  # fmt: skip
EVALS = {
    "errors": set(), "schema": set(), "tasks": {"errors", "testbed"}, "testbed": set(),
    "run": {"errors", "schema", "testbed"}, "jobs": {"errors", "run", "tasks"},
    "recipe": {"errors", "jobs", "run", "schema"}, "report": {"errors", "jobs", "run", "schema"},
    "demo": {"jobs", "run"}, "": set(),
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a file imports, and whether only within a function or for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.If)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bases = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            bases = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        yield from ((b, node in late) for b in bases if b.split(".")[0] == "hfpatch")


def room(module: str, package: str) -> str:
    rest = module.removeprefix(package).lstrip(".")
    return rest.split(".")[0]


def pairs(package: str) -> Iterator[tuple[str, str, str, str, bool]]:
    """(file, its room, the imported room, what is imported, late) wherever the two rooms differ."""
    for name, path in MODULES.items():
        if name.startswith("hfpatch.evals") != (package == "hfpatch.evals"):
            continue
        for other, late in imports(name, path):
            inside = other.startswith("hfpatch.evals") == name.startswith("hfpatch.evals")
            there = room(other, package) if inside else "evals" if package == "hfpatch" else "hfpatch"
            if (here := room(name, package)) != there and other != "hfpatch.recipes":
                yield name, here, there, other, late


def test_rooms_import_what_lies_below_them() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, here, there, other, late in pairs("hfpatch")
        if there not in ALLOWED[here] and not (late and (here, there) in LATE)
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_evals_import_what_lies_below_them() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, here, there, other, _ in pairs("hfpatch.evals")
        if there not in {*EVALS[here], "hfpatch"}
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_a_room() -> None:
    for package, known in (("hfpatch", ALLOWED), ("hfpatch.evals", EVALS)):
        rooms = {room(m, package) for m in MODULES if m.startswith("hfpatch.evals") == (package == "hfpatch.evals")}
        assert rooms == known.keys()


def test_no_file_is_longer_than_300_lines() -> None:
    found = [p for name in ("hfpatch", "evals", "recipes", "tests", "benchmarks") for p in (ROOT / name).rglob("*.py")]
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in found}
    assert {"hfpatch/api.py", "tests/test_layering.py"} <= lines.keys()
    assert not {name: n for name, n in lines.items() if n > 300}, "split by idea"


@pytest.mark.parametrize(
    "what", ["transformers.modeling_utils", "transformers.cache_utils", "transformers.masking_utils"]
)
def test_the_model_library_is_known_to_the_runtime_only(what: str) -> None:
    package = [p for name, p in MODULES.items() if not name.startswith("hfpatch.evals")]
    assert {p.parent.name for p in package if what in p.read_text(encoding="utf-8")} <= {"runtime"}


def test_the_walk_through_a_call_names_what_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(hfpatch/[\w/]+\.py)`", page))
    assert len(files) > 12 and not [f for f in files if not (ROOT / f).is_file()]
    places = re.findall(r'"([\w.]+)(?:, [\w, ]+)?: ([\w/]+\.py)"', page)
    assert len(places) > 8
    for name, file in places:
        text = (ROOT / "hfpatch" / file).read_text(encoding="utf-8")
        *cls, function = name.split(".")
        assert re.search(rf"(def|class) {function}\b", text) and all(f"class {c}" in text for c in cls), (name, file)
    for folder in FOLDERS.values():
        for room_ in (p.name for p in folder.iterdir() if (p / "__init__.py").is_file() and p.name != "integrations"):
            assert f"{folder.name}/{room_}`" in page or f"`{room_}`" in page, room_
