"""The pages say what is true: the example method works when pasted, and so does the README's script."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import methods_list
import pytest
import test_invariants as invariants
import torch
import zoo
from methods_list import MethodCase

import hfpatch
from hfpatch.config import registry

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adding-a-method.md"
README = ROOT / "README.md"
TINY = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_next", "gpt2"]


def marked(text: str, mark: str) -> str:
    """The code block that follows the HTML comment `mark`."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```\w*\n(.*?)```", text, re.S)
    assert found, f"no block marked {mark!r}"
    return found[1]


@pytest.fixture
def dilated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MethodCase]:
    """The page's method, put into the package as it says, and its line of the shared list."""
    text = PAGE.read_text()
    hfpatch.list_methods()
    (tmp_path / "dilated.py").write_text(marked(text, "file: hfpatch/methods/dilated.py"))
    monkeypatch.setattr(registry.builtin_package, "__path__", [*registry.builtin_package.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry._builtin_names.cache_clear()
    line = marked(text, "file: tests/methods_list.py").strip()
    yield eval(line.rstrip(","), vars(methods_list))
    registry._builtin_names.cache_clear()
    sys.modules.pop("hfpatch.methods.dilated", None)


@pytest.mark.parametrize("name", TINY)
def test_the_example_method_keeps_the_invariants(name: str, dilated: MethodCase) -> None:
    tiny = zoo.SUPPORTED[name]
    invariants.test_keep_all_equals_dense(tiny, dilated)
    invariants.test_unpatch_leaves_no_trace(tiny, dilated)
    invariants.test_padded_row_equals_row_alone(tiny, dilated, "left")
    invariants.test_prefill_and_decode_equal_one_shot(tiny, dilated)
    invariants.test_later_tokens_move_no_logit_before_their_tile(tiny, dilated)
    invariants.test_reported_density_is_the_counted_one(tiny, dilated)


def test_the_example_method_is_found_by_name_and_sparse(dilated: MethodCase, tmp_path: Path) -> None:
    assert "dilated" in hfpatch.list_methods()
    model = invariants.built("llama")
    ids = zoo.prompt(model, 1, 63)
    dense = invariants.logits(model, ids)
    with hfpatch.patched(model, dilated.name, **dilated.settings) as patch:
        assert not torch.equal(invariants.logits(model, ids), dense)
        i, j = torch.arange(63)[:, None], torch.arange(63)
        want = ((j <= i) & ((i - j < 8) | (j % 5 == 0))).sum() / (j <= i).sum()
        assert patch.report().density() == pytest.approx(float(want))
        patch.save_pretrained(tmp_path / "saved")
    assert hfpatch.PatchConfig.from_pretrained(tmp_path / "saved").methods == patch.config.methods


def rows(text: str) -> list[list[str]]:
    return [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if x.startswith("| `")]


def test_the_example_row_fits_the_readme_table() -> None:
    row = rows(marked(PAGE.read_text(), "file: README.md"))[0]
    table = README.read_text().split("## Methods", 1)[1].split("\n## ", 1)[0]
    header = next(x for x in table.splitlines() if x.startswith("| method"))
    assert len(row) == header.count("|") - 1 and row[0] == "`dilated`"


def test_the_readme_table_names_existing_methods() -> None:
    table = README.read_text().split("## Methods", 1)[1].split("\n## ", 1)[0]
    named = [row[0].strip("`") for row in rows(table)]
    assert {"dense", "streaming"} <= set(named) and len(named) == len(set(named))
    for name in named:
        assert hfpatch.get_method(name).config_class.method == name


@pytest.mark.parametrize("page", [p for p in (README, *sorted((ROOT / "docs").glob("*.md"))) if p.exists()], ids=str)
def test_python_on_the_pages_can_be_read(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(block.replace("...", "None") if block.startswith("MethodCase") else block, str(page), "exec")


def test_the_readme_script_runs_as_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    script = marked(README.read_text(), "test")
    assert len([x for x in script.splitlines() if x.strip()]) <= 10
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    scope: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, "README.md", "exec"), scope)
    assert "layers patched" in printed.getvalue() and "decode" in printed.getvalue()
    with pytest.raises(hfpatch.NotPatchedError):
        hfpatch.get_patch(scope["model"])
