"""What importing pulls in, and how the source is kept: file sizes, cycles, model types."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["lm_eval", "datasets", "matplotlib", "triton", "accelerate", "typer", "rich", "yaml", "flash_attn"]
LIMIT_LINES = 300
SOURCES = sorted(p for folder in ("hfpatch", "evals") for p in (ROOT / folder).rglob("*.py"))

PROBE = """
import json, sys
import torch
from transformers import PreTrainedModel
before = set(sys.modules)
import hfpatch
names = [getattr(hfpatch, name) for name in hfpatch.__all__]
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@cache
def probe() -> list[str]:
    """What a fresh interpreter loads on top of torch and Transformers' models."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_pulls_in_nothing_heavy() -> None:
    new = {name.split(".")[0] for name in probe()}
    assert not new & set(HEAVY)
    assert not [n for n in probe() if n.startswith(("hfpatch.evals", "hfpatch.integrations", "hfpatch.cli"))]


def test_names_are_loaded_when_asked_for() -> None:
    code = (
        "import sys, hfpatch; print('torch' in sys.modules, hfpatch.__version__ > '0'); hfpatch.patch_model; "
        "print('torch' in sys.modules, hfpatch.config.__name__, 'Patch' in dir(hfpatch), hasattr(hfpatch, 'no'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\nTrue hfpatch.config True False\n"


def test_no_file_is_too_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    assert len(lengths) > 20
    assert not {name: n for name, n in lengths.items() if n > LIMIT_LINES}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "hfpatch" else ("hfpatch", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import: the module's body and its `if` and `try` blocks, not TYPE_CHECKING ones."""
    out, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            todo += [x for x in ast.iter_child_nodes(node) if isinstance(x, ast.stmt)]
        else:
            out.append(node)
    return out


def imported(path: Path, name: str, known: set[str]) -> set[str]:
    """Modules of ours that `path` imports at the top level."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in top_level(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return (found & known) - {name}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of the graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph[node]):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_modules_do_not_import_each_other_in_circles() -> None:
    names = {module_name(p): p for p in SOURCES}
    graph = {name: imported(p, name, set(names)) for name, p in names.items()}
    assert sum(map(len, graph.values())) > 40 and "hfpatch.runtime.injection" in graph["hfpatch.api"]
    assert not cycle(graph)


def test_a_cycle_would_be_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_model_types_are_known_to_injection_only() -> None:
    named = re.compile(r"model_type\s*(==|!=|in\b|not in\b)")
    guilty = [p.name for p in SOURCES if p.name != "injection.py" and named.search(p.read_text())]
    assert not guilty


def test_transformers_internals_are_known_to_three_files_only() -> None:
    named = re.compile(r"ALL_ATTENTION_FUNCTIONS|AttentionMaskInterface|_attn_implementation_internal")
    package = [p for p in SOURCES if p.is_relative_to(ROOT / "hfpatch")]
    knowing = {"injection.py", "raw_call.py", "attention_source.py"}
    guilty = [p.name for p in package if p.name not in knowing and named.search(p.read_text())]
    assert not guilty


def test_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "hfpatch", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: python -m hfpatch [OPTIONS] COMMAND" in done.stdout
