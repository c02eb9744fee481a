"""Facts in streamed texts, and the job that asks for them under readers and under plain variants."""

import random
from itertools import count, islice

import pytest
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.recipe.build import build_run
from hfpatch.evals.recipe.recipe import load_recipe
from hfpatch.evals.report.read import read_results
from hfpatch.evals.report.tables import print_results
from hfpatch.evals.run.runner import execute
from hfpatch.evals.tasks.stream import stream
from rich.console import Console

from hfpatch.text.sources import sentences

RECIPE = """model: MODEL
variants:
  - name: infiniretri
    patch: infiniretri
    settings: {chunk_tokens: 128, top_tokens: 16, keep_budget: 64}
  - name: streaming
    patch: streaming
    settings: {window: 32}
tasks:
  - {task: reader, lengths: [256, 1024], depths: [0, 100], at_most: {dense: 256, streaming: 1024}}
  - {task: reader, label: chain, facts: tracking, haystack: prose, lengths: [512], depths: [50], samples: 2}
"""


@pytest.mark.parametrize("haystack", ["grammar", "prose"])
@pytest.mark.parametrize("depth", [0, 0.37, 1])
def test_stream_fills_the_length_and_puts_the_fact_at_its_depth(tokenizer, haystack, depth):
    fact, length = "The secret code for brisk-otter is 123456.", 1500
    text = "".join(stream(tokenizer, [fact], [depth], sentences(haystack, random.Random(3)), length))
    assert text.count(f"{fact} ") == 1
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert length - 120 < tokens <= length
    before = len(tokenizer(text[: text.index(fact)], add_special_tokens=False)["input_ids"])
    assert abs(before - depth * tokens) < 120


def test_stream_keeps_the_order_of_facts_and_draws_no_more_than_it_gives(tokenizer):
    facts = [f"Fact number {n}." for n in range(4)]
    drawn = []

    def source():
        for n in count():
            drawn.append(n)
            yield f"This is the sentence number {n}."

    pieces = stream(tokenizer, facts, [0.0, 0.0, 1e-7, 1.0], source(), 10**9)
    text = "".join(islice(pieces, 3))
    assert [text.index(f) for f in facts[:3]] == sorted(text.index(f) for f in facts[:3])
    assert facts[3] not in text and len(drawn) < 300
    with pytest.raises(EvaluationError, match="too few"):
        list(stream(tokenizer, facts, [0.0] * 4, source(), 10))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("reader")
    file = out / "recipe.yaml"
    file.write_text(RECIPE.replace("MODEL", folder))
    return out, execute(build_run(load_recipe(file)), out)


def test_reader_job_reads_in_chunks_or_gives_the_whole_text(finished):
    out, results = finished
    needle, chain = results["jobs"]
    cells = {(r["variant"], r["length"]) for r in needle["rows"]}
    assert cells == {(v, 256) for v in ("dense", "infiniretri", "streaming")} | {
        ("infiniretri", 1024), ("streaming", 1024)
    }  # fmt: skip
    for row in [*needle["rows"], *chain["rows"]]:
        reads = row["variant"] == "infiniretri"
        assert row["reads_in_chunks"] == reads and (row["kept"] is not None) == reads
        assert row["busy_seconds"] > 0 and row["samples"] in (1, 2) and (not reads or row["chunks"] > 1)
    assert {r["samples"] for r in chain["rows"]} == {2}
    texts = [r for r in needle["rows"] if r["variant"] == "infiniretri"]
    short, long = (next(r["chunks"] for r in texts if r["length"] == n) for n in (256, 1024))
    assert long == pytest.approx(4 * short, abs=3)
    assert read_results(out)["jobs"] == results["jobs"]


def test_reader_job_is_shown_and_not_repeated(finished, monkeypatch):
    out, results = finished
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as shown:
        print_results(results, console)
    assert "answers found" in shown.get() and "of 2" in shown.get()
    monkeypatch.setattr("hfpatch.evals.jobs.reader.ReaderJob.run", None)
    assert execute(build_run(load_recipe(out / "recipe.yaml")), out)["jobs"] == results["jobs"]


def test_plain_variants_need_positions_or_permission(tmp_path, folder):
    text = RECIPE.replace("MODEL", folder).replace("[256, 1024]", "[8192]")
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace(", at_most: {dense: 256, streaming: 1024}", ""))
    with pytest.raises(EvaluationError, match="positions for 4096 tokens"):
        execute(build_run(load_recipe(file)), tmp_path / "a")
    file.write_text(text.replace("streaming: 1024", "stream: 1024"))
    with pytest.raises(EvaluationError, match="at_most names 'stream', which is no variant"):
        execute(build_run(load_recipe(file)), tmp_path / "b")
