"""Kinds of job: all are listed, found by name and in the recipes' schema; the page's example works as pasted."""

import json
import re
import sys
from io import StringIO
from pathlib import Path

import hfpatch.evals.jobs
import jobs_list
import pytest
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs import registry
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.recipe.build import build_run
from hfpatch.evals.recipe.recipe import load_recipe
from hfpatch.evals.recipe.schema import whole_text
from hfpatch.evals.report.compare import print_comparison
from hfpatch.evals.report.read import read_results
from hfpatch.evals.report.tables import print_results
from hfpatch.evals.report.write import write_report
from hfpatch.evals.run.cells import Session
from hfpatch.evals.run.estimate import Speed, estimate
from hfpatch.evals.run.journal import Journal
from hfpatch.evals.run.models import load_model
from hfpatch.evals.run.runner import execute
from hfpatch.evals.schema import FOLDER
from jobs_list import KINDS, Kind
from rich.console import Console

from hfpatch.errors import HfpatchError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-an-evaluation.md"
RECIPE = """model: embedded
variants: [{patch: "streaming:window=32"}]
measures:
  - {measure: agreement, lengths: [96, 128], samples: 1}
"""


def test_every_kind_is_in_the_list() -> None:
    assert {kind.job.kind for kind in KINDS} == set(registry.job_kinds())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.job.kind)
def test_rows_keep_their_schema_and_the_view_says_them(kind: Kind, tmp_path: Path) -> None:
    job, variants = kind.job, build_run(load_recipe(FOLDER / "quickstart.yaml")).variants[:1]
    rows = job.rows({cell: kind.data(job) for cell in job.cells(variants)})
    entry = {"label": job.label, "kind": job.kind, "settings": job.settings(), "rows": rows, **job.more(rows)}
    view = type(job).view(json.loads(json.dumps(entry)))
    assert view.numbers and {n.variant for n in view.numbers} >= {"dense"}
    assert all(len(row) == len(view.table.header) for row in view.table.rows)
    assert sorted(job.settings_schema()["properties"]) == sorted(
        {job.group, "label", *job.settings()} - ({"order"} if job.kind == "latency" else set())
    )


def test_the_schema_for_editors_is_up_to_date() -> None:
    assert (FOLDER / "schema.json").read_text(encoding="utf-8") == whole_text(), "run `make schema`"


def test_no_kind_is_named_outside_its_file() -> None:
    """But by the command that is for it, and by the demonstration; "task" is a list of recipes as well."""
    kinds = "|".join(registry.job_kinds())
    files = [p for room in ("run", "recipe", "report") for p in (ROOT / "evals" / room).glob("*.py")]
    files += [ROOT / "evals" / "jobs" / f"{name}.py" for name in ("base", "registry", "view", "scores")]
    asked = r"""\b(job|entry)(\.kind|\["kind"\]) (==|!=|in)|isinstance\(job"""
    named = re.compile(rf"""["']({kinds})["']|{asked}|jobs\.(latency|lm_eval|memory|niah|perplexity|task|reader)\b""")
    found = [(p.name, m[0]) for p in files for m in named.finditer(p.read_text(encoding="utf-8"))]
    assert [f for f in found if f not in {("base.py", '"task"'), ("registry.py", '"task"')}] == []


def test_a_kind_has_a_name_of_its_own_and_a_known_group() -> None:
    with pytest.raises(EvaluationError, match=r"'niah' is taken by hfpatch\.evals\.jobs\.niah"):
        registry.register_job(type("Other", (NiahJob,), {}))
    with pytest.raises(EvaluationError, match="group 'tasks' is not one of task, measure"):
        registry.register_job(type("Other", (NiahJob,), {"kind": "other", "group": "tasks"}))
    assert "other" not in registry.job_kinds()


@pytest.fixture
def agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """The page's job, put into the package as it says, and its line of the shared list."""
    code, line = (
        re.search(rf"<!-- file: {re.escape(file)} -->\n```python\n(.*?)```", PAGE.read_text(), re.S)[1]
        for file in ("evals/jobs/agreement.py", "tests/jobs_list.py")
    )
    (tmp_path / "agreement.py").write_text(code)
    monkeypatch.setattr(hfpatch.evals.jobs, "__path__", [*hfpatch.evals.jobs.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    job = registry.job_kinds()["agreement"]
    yield eval(line.strip().rstrip(","), {**vars(jobs_list), "AgreementJob": job})
    sys.modules.pop("hfpatch.evals.jobs.agreement", None)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def test_the_page_s_job_runs_and_is_shown_everywhere(agreement: Kind, recipe: Path, tmp_path: Path) -> None:
    results = execute(build_run(load_recipe(recipe)), tmp_path / "out")
    read = read_results(tmp_path / "out")
    assert read["jobs"] == results["jobs"]
    rows = {(r["variant"], r["length"]): r["agreement"] for r in read["jobs"][0]["rows"]}
    assert rows["dense", 128] == 1.0 and 0 < rows["streaming:window=32", 128] < 1
    value = f"{rows['streaming:window=32', 128]:.1%}"
    told = StringIO()
    print_results(read, Console(file=told, width=80))
    assert "Agreement with dense: same first choice" in told.getvalue() and value in told.getvalue()
    files = write_report(read, tmp_path / "out")
    assert [f.name for f in files] == ["agreement.png", "report.html"]
    page = files[1].read_text()
    assert "<h2>Agreement with dense</h2>" in page and f"<td>{value}</td>" in page
    compared = StringIO()
    other = json.loads(json.dumps(read))
    other["jobs"][0]["rows"][0]["agreement"] = 0.5
    print_comparison(read, other, ("a", "b"), Console(file=compared, width=120))
    assert re.search(r"agreement: agreement.*dense.*100\.0%.*50\.0%.*-50\.0 points", compared.getvalue())


def test_the_page_s_job_is_estimated_checked_and_gone_on_with(
    agreement: Kind, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(load_recipe(recipe))
    session = Session("embedded", run.variants)
    session.loaded = load_model("embedded")
    (found,) = estimate(run, session, Speed(linear=1.0, square=0.0, token=9.0, load=3.0))
    assert (found.cells, found.prompts, found.seconds) == (4, 8, 2 * 2 * (96 + 128))
    journal = Journal(tmp_path / "out" / "cells.jsonl", run.arguments()).open()
    record = {"samples": [], "seconds": 0.5, "model": session.loaded.describe()}
    for job, cell in run.cells():
        journal.add(cell.key, {"data": agreement.data(job), **record})
    journal.close()
    monkeypatch.setattr(type(agreement.job), "run", None)
    assert {r["agreement"] for r in execute(run, tmp_path / "out")["jobs"][0]["rows"]} == {0.75}
    recipe.write_text(RECIPE.replace("samples: 1", "sample: 1"))
    with pytest.raises(HfpatchError, match=r":4: there is no setting 'sample'; did you mean 'samples'\?"):
        load_recipe(recipe)
    assert json.loads(whole_text())["$defs"]["kinds"]["agreement"]["required"] == ["measure", "lengths"]
