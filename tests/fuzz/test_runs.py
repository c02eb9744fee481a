"""Recipes, journals and results with anything in them: read, or refused in a sentence; never endless, nothing lost."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hfpatch.evals.recipe.build import build_run
from hfpatch.evals.recipe.recipe import load_recipe
from hfpatch.evals.report.compare import print_comparison
from hfpatch.evals.report.page import write_page
from hfpatch.evals.report.read import read_results
from hfpatch.evals.report.tables import print_results
from hfpatch.evals.run import runner
from hfpatch.evals.run.journal import Journal
from hfpatch.evals.run.results import RESULTS
from hfpatch.evals.run.resume import check_done
from hfpatch.evals.run.runner import write_results
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_fuzz import ENVIRONMENT, RUN, changed_bytes, changed_data, fixed, record_of, refused, runs

from hfpatch.text.sources import sentences

RECIPE = """# a job of every kind
title: Every kind
about: What could go wrong?
model: embedded
dtype: auto
seed: 3
variants:
  - patch: streaming:window=32
  - {patch: quest, settings: {budget: 64}, name: small}
  - methods: [{method: streaming, window: 8}, {method: quest, budget: 32}]
tasks:
  - {task: niah, lengths: [128, 256], depths: [0, 100], samples: 2, haystack: grammar, batch_size: 2}
  - {task: multi_key, lengths: [256], samples: 2, options: {distractors: 3}, label: keys}
  - {task: perplexity, lengths: [128], samples: 2, buckets: 2}
  - {task: reader, lengths: [512], facts: tracking, at_most: {dense: 512}}
  - {task: lm-eval, tasks: [arc_easy], limit: 3, metadata: {max_seq_lengths: [512]}}
measures:
  - measure: latency
    lengths: [64, 257]
    decode_tokens: 2
    repeats: 1
  - {measure: memory, lengths: [64]}
  - {measure: audit, lengths: [64], samples: 1, rows_per_call: 4, tiles: 0, new_tokens: 0}
output: out/every
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that could be those of the Hub are not looked up; no waiting for disks, no looking at the machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(runner, "environment", lambda device: ENVIRONMENT)
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE)
    return file, load_recipe(file).data


def read_and_build(file: Path) -> None:
    run = build_run(load_recipe(file))
    assert run.arguments()["jobs"] and run.steps(run.cells()) >= 0


@runs(250)
def test_recipes_with_changed_text(recipe: tuple[Path, Any], examples: int) -> None:
    @fixed(examples)
    @given(changed_bytes(RECIPE.encode()))
    def check(raw: bytes) -> None:
        recipe[0].write_bytes(raw)
        told = refused(lambda: read_and_build(recipe[0]))
        assert told is None or str(recipe[0]) in told or "at_most" in told

    check()


@runs(250)
def test_recipes_with_changed_values(recipe: tuple[Path, Any], examples: int) -> None:
    @fixed(examples)
    @given(changed_data(recipe[1]))
    def check(data: Any) -> None:
        recipe[0].write_text(json.dumps(data))
        refused(lambda: read_and_build(recipe[0]))

    check()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run with a job of every kind."""
    out = tmp_path_factory.mktemp("run")
    journal = Journal(out / "cells.jsonl", RUN.arguments()).open()
    for job, cell in RUN.cells():
        journal.add(cell.key, record_of(job, cell))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "environment", lambda device: ENVIRONMENT)
        write_results(RUN, journal, out)
    journal.close()
    yield out


def go_on(path: Path) -> None:
    """Open a journal as a run does, and write its results when no cell is left to run."""
    journal = Journal(path, RUN.arguments()).open()
    try:
        check_done(journal, RUN.cells())
        before = dict(journal.done)
        missing = [(job, cell) for job, cell in RUN.cells() if cell.key not in before]
        for job, cell in missing:
            journal.add(cell.key, record_of(job, cell))
        results = write_results(RUN, journal, path.parent)
        print_results(results, Console(file=io.StringIO()))
        again = Journal(path, RUN.arguments()).read().done
        assert len(again) == len(RUN.cells()) and all(again[key] == line for key, line in before.items())
    finally:
        journal.close()


def resumed_or_left_alone(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    if told := refused(lambda: go_on(path)):
        assert path.read_bytes() == raw, "a journal that is refused is not touched"
        assert "--fresh" in told
    else:
        whole = raw[: raw.rfind(b"\n") + 1]
        assert path.read_bytes().startswith(whole), "whole lines stay"


@runs(150)
def test_journals_with_changed_bytes(finished: Path, tmp_path: Path, examples: int) -> None:
    good = (finished / "cells.jsonl").read_bytes()

    @fixed(examples)
    @given(changed_bytes(good))
    def check(raw: bytes) -> None:
        resumed_or_left_alone(tmp_path / "cells.jsonl", raw)

    check()


@runs(120)
def test_journals_with_changed_values(finished: Path, tmp_path: Path, examples: int) -> None:
    lines = [json.loads(line) for line in (finished / "cells.jsonl").read_bytes().split(b"\n")[:-1]]

    @fixed(examples)
    @given(st.sampled_from(range(len(lines))).flatmap(lambda n: st.tuples(st.just(n), changed_data(lines[n]))))
    def check(change: tuple[int, Any]) -> None:
        changed = [*lines[: change[0]], change[1], *lines[change[0] + 1 :]]
        resumed_or_left_alone(tmp_path / "cells.jsonl", "".join(json.dumps(line) + "\n" for line in changed).encode())

    check()


def test_a_journal_cut_anywhere_goes_on(finished: Path, tmp_path: Path) -> None:
    good = (finished / "cells.jsonl").read_bytes()
    ends = [n for n, c in enumerate(good) if c == 10]
    cuts = {*range(0, len(good), 997), *(n + d for n in (ends[0], ends[-2]) for d in (-1, 0, 1, 2, 9))}
    for cut in sorted(c for c in cuts if c <= len(good)):
        path = tmp_path / "cells.jsonl"
        for zeros in (0, 5):
            path.write_bytes(good[:cut] + b"\0" * zeros)
            assert refused(lambda path=path: go_on(path)) is None
            kept = good[: good.rfind(b"\n", 0, cut) + 1]
            assert path.read_bytes().startswith(kept)


def show(folder: Path, page: Path) -> None:
    """All that is made from results."""
    results = read_results(folder)
    console = Console(file=io.StringIO())
    print_comparison(results, results, ("[a]", "b"), console, everything=True)
    print_results(results, console)
    picture = page.with_suffix(".png")
    write_page(results, {job["label"]: picture for job in results["jobs"]}, picture, page)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "report.png").write_bytes(b"")
    return tmp_path / "report.html"


def test_good_results_are_shown(finished: Path, page: Path) -> None:
    show(finished, page)
    assert b"Peak memory" in page.read_bytes()


@runs(150)
def test_results_with_changed_values(finished: Path, page: Path, examples: int) -> None:
    good = json.loads((finished / RESULTS).read_bytes())
    file = page.with_name(RESULTS)

    @fixed(examples)
    @given(changed_data(good))
    def check(data: Any) -> None:
        file.write_text(json.dumps(data))
        told = refused(lambda: show(file.parent, page))
        assert told is None or str(file) in told

    check()


@runs(150)
def test_results_with_changed_bytes(finished: Path, page: Path, examples: int) -> None:
    good = (finished / RESULTS).read_bytes()
    file = page.with_name(RESULTS)

    @fixed(examples)
    @given(changed_bytes(good))
    def check(raw: bytes) -> None:
        file.write_bytes(raw)
        told = refused(lambda: show(file.parent, page))
        assert told is None or str(file) in told

    check()


LONG = "x" * 9000


@pytest.mark.parametrize(
    "old,new",
    [
        ("patch: streaming:window=32", f"patch: {LONG}"), ("patch: streaming:window=32", f"patch: streaming:{LONG}"),
        ("patch: streaming:window=32", f"patch: 'streaming:window={LONG}'"), ("patch: quest,", f"patch: {LONG},"),
        ("name: small", f"name: '{LONG}'"), ("task: multi_key", f"task: {LONG}"), ("task: niah", f"task: {LONG}"),
        ("haystack: grammar", f"haystack: {LONG}"), ("at_most: {dense: 512}", f"at_most: {{{LONG}: 512}}"),
        ("measure: latency", f"measure: {LONG}"), ("distractors: 3", f"{LONG}: 3"), ("dtype: auto", f"dtype: {LONG}"),
        ("title: Every kind", f"{LONG}: Every kind"),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_what_a_recipe_holds_is_not_told_at_length(recipe: tuple[Path, Any], old: str, new: str) -> None:
    assert old in RECIPE
    recipe[0].write_text(RECIPE.replace(old, new, 1))

    def build_and_draw() -> None:
        run = build_run(load_recipe(recipe[0]))
        run.cells()
        sentences(LONG, random.Random(0))

    told = refused(build_and_draw)
    assert told is not None and len(told) < 1000
