"""The report of a run: every plot and table is there, nothing is fetched from elsewhere, two runs can be compared."""

import base64
import json
import re
from io import StringIO

import pytest
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs.latency import ASPECTS, LatencyJob
from hfpatch.evals.jobs.scores import LIKELY, SCORE
from hfpatch.evals.jobs.view import Answer, TableCell
from hfpatch.evals.recipe.build import build_run
from hfpatch.evals.recipe.recipe import load_recipe
from hfpatch.evals.report.compare import differences, print_comparison, values
from hfpatch.evals.report.page import write_page
from hfpatch.evals.report.plots import draw, look
from hfpatch.evals.report.read import read_results
from hfpatch.evals.report.summary import headline, lines, score_points, sentences, views
from hfpatch.evals.report.tables import print_results
from hfpatch.evals.report.write import write_report
from hfpatch.evals.run.runner import execute
from hfpatch.evals.run.stats import interval, memory_text, spread_text, time_text, tokens
from PIL import Image
from rich.console import Console

RECIPE = """title: Small <run>
about: Is it still right & is it faster?
model: {folder}
variants:
  - patch: streaming:window=32
  - patch: quest:budget=16,min_length=0
tasks:
  - {{task: niah, lengths: [128, 256], depths: [0, 100], samples: 1}}
  - {{task: multi_key, lengths: [256], samples: 2}}
  - {{task: perplexity, lengths: [128], samples: 1, buckets: 2}}
measures:
  - {{measure: latency, lengths: [64, 257], decode_tokens: 2, repeats: 1}}
"""


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    (out / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    results = execute(build_run(load_recipe(out / "recipe.yaml")), out)
    memory = [
        {"variant": v["name"], "length": n, "peak_prefill": n * 2**20, "peak_decode": n * 2**19, "peak": n * 2**20,
         "ratio": 1.0, "how": "made up", "question_in_sparse_part": False}
        for v in results["variants"] for n in (64, 257)
    ]  # fmt: skip
    results["jobs"].append({"label": "memory", "kind": "memory", "settings": {}, "rows": memory})
    (out / "results.json").write_text(json.dumps(results))
    return out


def test_page_is_complete_and_self_contained(out):
    results = read_results(out)
    files = write_report(results, out)
    page = (out / "report.html").read_text()
    pngs = [f for f in files if f.suffix == ".png"]
    assert len(pngs) == 6 and all(f.read_bytes().startswith(b"\x89PNG") for f in pngs)
    images = re.findall(r'src="([^"]*)"', page)
    assert len(images) == 6 and all(i.startswith("data:image/png;base64,") for i in images)
    assert {base64.b64decode(i.split(",")[1]) for i in images} == {f.read_bytes() for f in pngs}
    assert not re.search(r'(?:href|src)="(?!data:)', page) and "http://" not in page
    assert "<title>Small &lt;run&gt;" in page and "right &amp; is" in page
    for heading in ("The answer", "Accuracy against density", "Needle in a haystack", "Task multi_key", "Latency",
                    "Perplexity by position", "Peak memory", "How it was made"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    for version in results["environment"]["versions"].values():
        assert version in page


def test_tables_fit_a_narrow_terminal_and_name_every_variant(out):
    told = StringIO()
    results = read_results(out)
    print_results(results, Console(file=told, width=80))
    text = told.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert len(re.findall(r"x dense, \d+/s", text)) == len(results["jobs"][3]["rows"])
    assert "x dense" in text and "Perplexity by position" in text and "needles found" in text
    assert text.count("streaming:window=32") >= 3


def test_headline_takes_speed_of_the_longest_prompts_and_decode_density_of_decode_methods(out):
    results = read_results(out)
    found = headline(results, views(results))
    dense, streaming, quest = ({a.name: x.value(a) for a in x.answers} for x in found)
    latency = {(r["variant"], r["length"]): r for r in results["jobs"][3]["rows"]}
    fast = latency["streaming:window=32", 257]["ttft_speedup"]
    assert dense["prefill speed"] == 1.0 and streaming["prefill speed"] == fast
    points = score_points(found)
    assert points["dense"][1] == 1.0 and points["quest:budget=16,min_length=0"][1] < 0.5
    nlls = score_points(found, LIKELY)
    assert nlls.keys() <= points.keys() and all(nlls[name][1] == points[name][1] for name in nlls)
    assert all(x.value(LIKELY) == nlls[x.variant][0] for x in found if x.variant in nlls)
    rows = [r for j in results["jobs"][:2] for r in j["rows"] if r["variant"] == "quest:budget=16,min_length=0"]
    assert all(r["density_prefill"] == 1.0 for r in rows)
    assert len(sentences(found)) == 2 and sentences(found)[1].startswith("quest:budget=16,min_length=0 scores")
    assert quest["memory"] == 1.0


def test_needle_tables_carry_wilson_intervals_on_the_page_and_where_there_is_room(out):
    results = read_results(out)
    job = results["jobs"][0]
    row = job["rows"][0]
    assert (row["low"], row["high"]) == interval(row["score"], 1)
    own = [r["score"] for r in job["rows"] if (r["variant"], r["length"]) == ("dense", 128)]
    low, high = interval(sum(own) / 2, 2)
    shown, small = f"{sum(own) / 2:.0%}", f"[{low * 100:.0f}-{high * 100:.0f}]"
    assert views(results)[0].table.cells[0][1] == TableCell(shown, small)
    write_report(results, out)
    assert f"<td>{shown} <small>{small}</small></td>" in (out / "report.html").read_text()
    for width, there in ((120, f"{shown} {small}"), (72, small), (40, shown)):
        told = StringIO()
        print_results({**results, "jobs": [job]}, Console(file=told, width=width), words=False)
        assert there in told.getvalue() and max(map(len, told.getvalue().splitlines())) <= width
        assert (small in told.getvalue()) == (width > 40)


def test_changes_within_the_spreads_are_marked(out):
    a, b = read_results(out), read_results(out)
    for results, scores in ((a, 1.0), (b, 0.0)):
        for r in results["jobs"][1]["rows"]:
            r["score"], r["samples"] = scores, 2 if r["variant"] == "dense" else 20
    told = StringIO()
    print_comparison(a, b, ("first", "second"), Console(file=told, width=160))
    marks = dict(re.findall(r"multi_key: score\W+(\S+) .* (\S+) points", told.getvalue()))
    assert marks == {"dense": "~-100.0", "streaming:window=32": "-100.0", "quest:budget=16,min_length=0": "-100.0"}


def test_comparison_shows_what_changed_and_what_was_made_differently(out):
    a, b = read_results(out), read_results(out)
    b["jobs"][1]["rows"][0]["score"] = 0.125
    b["jobs"][3]["rows"][0]["ttft"]["median"] *= 2
    b["environment"]["versions"]["torch"] = "9.9"
    del b["jobs"][2]
    told = StringIO()
    print_comparison(a, b, ("first", "second"), Console(file=told, width=160))
    text = told.getvalue()
    assert "multi_key: score" in text and "12.5%" in text and "+100.0%" in text
    assert "numbers are in first only" in text and "against 9.9" in text
    assert text.count("dense") == 2 and differences(a, a) == []
    assert values(a)[("niah: score", "dense", "128")].value == sum(
        r["score"] for r in a["jobs"][0]["rows"] if (r["variant"], r["length"]) == ("dense", 128)
    ) / 2  # fmt: skip


def test_compare_refuses_what_is_no_result(tmp_path):
    with pytest.raises(EvaluationError, match="There is no results"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(EvaluationError, match="not written by hfpatch"):
        read_results(tmp_path)


def edited(results, where, value):
    """The results with a value replaced, or taken out when it is `...`."""
    data = json.loads(json.dumps(results))
    *path, last = where
    at = data
    for key in path:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return data


ROW = ("jobs", 0, "rows", 0)
EDITS = {
    "no environment": (("environment",), ..., "the file needs 'environment'"),
    "environment null": (("environment",), None, "environment must be a mapping, not null"),
    "no versions": (("environment", "versions"), ..., "environment needs 'versions'"),
    "number for a version": (
        ("environment", "versions", "torch"),
        2,
        "environment.versions.torch must be text, not 2",
    ),
    "arguments list": (("arguments",), [], "arguments must be a mapping"),
    "jobs null": (("jobs",), None, "jobs must be a list, not null"),
    "jobs of numbers": (("jobs", 0), 5, "jobs[0] must be a mapping, not 5"),
    "no kind": (("jobs", 0, "kind"), ..., "jobs[0] needs 'kind'"),
    "unknown kind": (("jobs", 0, "kind"), "speed", 'jobs[0].kind is "speed"; it must be one of audit, latency'),
    "label that leaves the folder": (("jobs", 0, "label"), "../x", "jobs[0].label"),
    "no rows": (("jobs", 0, "rows"), ..., "jobs[0] needs 'rows'"),
    "rows null": (("jobs", 0, "rows"), None, "jobs[0].rows must be a list"),
    "empty rows": (("jobs", 0, "rows"), [], "jobs[0].rows is empty"),
    "row null": (ROW, None, "jobs[0].rows[0] must be a mapping"),
    "no score": ((*ROW, "score"), ..., "jobs[0].rows[0] needs 'score'"),
    "score text": ((*ROW, "score"), "x", 'jobs[0].rows[0].score must be a number, not "x"'),
    "score true": ((*ROW, "score"), True, "jobs[0].rows[0].score must be a number, not true"),
    "score nan": ((*ROW, "score"), float("nan"), "jobs[0].rows[0].score must be a number, not NaN"),
    "score huge": ((*ROW, "score"), 1e200, "jobs[0].rows[0].score must be a number"),
    "length text": ((*ROW, "length"), "x", "jobs[0].rows[0].length must be a whole number"),
    "length zero": ((*ROW, "length"), 0, "jobs[0].rows[0].length is 0; it must be at least 1"),
    "length with a point": ((*ROW, "length"), 64.0, "must be a whole number, not 64.0"),
    "task without a density": (("jobs", 1, "rows", 0, "density_decode"), ..., "needs 'density_decode'"),
    "perplexity text": (("jobs", 2, "rows", 0, "perplexity"), "x", "perplexity must be a number"),
    "no spread": (("jobs", 3, "rows", 0, "ttft"), 1.0, "jobs[3].rows[0].ttft must be a mapping"),
    "spread of text": (("jobs", 3, "rows", 0, "tpot", "low"), "x", "tpot.low must be a number"),
    "no repeats": (("jobs", 3, "settings", "repeats"), ..., "jobs[3].settings needs 'repeats'"),
    "break-even of nothing": (("jobs", 3, "break_even", 0, "relation"), "x", "break_even[0].relation"),
    "peak text": (("jobs", 4, "rows", 0, "peak"), "x", "jobs[4].rows[0].peak must be a number"),
    "no variants": (("variants",), [], "variants is empty"),
    "variant without a name": (("variants", 0, "name"), ..., "variants[0] needs 'name'"),
    "methods text": (("variants", 1, "patch", "methods"), "x", "variants[1].patch.methods must be a list"),
    "no model": (("model",), None, "model must be a mapping"),
    "notes of numbers": (("notes",), [5], "notes[0] must be text, not 5"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_results_are_one_sentence_with_the_place(name, out, tmp_path):
    where, value, sentence = EDITS[name]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(edited(read_results(out), where, value)))
    with pytest.raises(EvaluationError) as raised:
        read_results(tmp_path)
    told = str(raised.value)
    assert told.startswith(f"{file}: ") and sentence in told and "\n" not in told and len(told) < 400


BROKEN = {
    "cut": '{"jobs": [', "deep": "[" * 100_000, "deep and closed": "[" * 90 + "]" * 90, "empty": "",
    "key twice": '{"jobs": [], "jobs": []}', "long number": '{"jobs": ' + "9" * 5000 + "}", "list": "[]",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_results_are_one_sentence(name, tmp_path):
    (tmp_path / "results.json").write_text(BROKEN[name])
    with pytest.raises(EvaluationError, match=r"results\.json (is not valid JSON|was not written by hfpatch)"):
        read_results(tmp_path)


def test_results_that_are_not_finite_where_that_happens_and_odd_texts_are_shown(out, tmp_path):
    results = edited(read_results(out), ("jobs", 2, "rows", 0, "perplexity"), float("nan"))
    results = edited(results, ("variants", 1, "name"), "[/red] \ud800 :smile:")
    results["jobs"][0]["rows"][0]["variant"] = "[/red] \ud800 :smile:"
    file = tmp_path / "results.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(results).encode())
    told = StringIO()
    print_comparison(
        read_results(tmp_path), read_results(tmp_path), ("[/a]", "b"), Console(file=told), everything=True
    )
    print_results(read_results(tmp_path), Console(file=told))
    assert "[/red]" in told.getvalue() and "nan" in told.getvalue()
    write_report(read_results(out), tmp_path)
    write_page(
        read_results(tmp_path), {j["label"]: tmp_path / "niah.png" for j in results["jobs"]}, None, tmp_path / "p"
    )
    assert b"\\ud800" in (tmp_path / "p").read_bytes()


def test_units():
    assert [tokens(n) for n in (300, 512, 1024, 1536, 32768)] == ["300", "512", "1k", "1.5k", "32k"]
    assert [time_text(s) for s in (0.0123, 1.5, 150)] == ["12.3 ms", "1.50 s", "2.5 min"]
    assert spread_text({"median": 1.0, "low": 0.97, "high": 1.03}) == "1.00 s (0.97..1.03)"
    assert spread_text({"median": 0.0123, "low": 0.0118, "high": 1.5}) == "12.3 ms (11.8..1500.0)"
    assert [memory_text(b) for b in (3 * 2**20, 3 * 2**30)] == ["3 MiB", "3.00 GiB"]


def test_many_variants_keep_colours_and_markers_apart_and_become_bars(tmp_path):
    looks = [look(n) for n in range(16)]
    assert len({(s["color"], s["marker"], s["markerfacecolor"]) for s in looks}) == 16
    spread = {"median": 1.0, "low": 1.0, "high": 1.0}
    rows = [
        {"variant": f"method {n}", "length": 64, "ttft": spread, "tpot": spread,
         "ttft_speedup": 1.0, "tpot_speedup": 0.5, "ttft_clear": True, "tpot_clear": True, "density_prefill": 1.0,
         "density_decode": 1.0, "tokens_per_second": 1.0, "load_before": None}
        for n in range(12)
    ]  # fmt: skip

    def size(rows):
        entry = {"label": "latency", "kind": "latency", "rows": rows, "settings": {"repeats": 1}, "break_even": []}
        return Image.open(draw(LatencyJob.view(entry).plot, tmp_path / "plot.png", "x")).size

    few, many = size(rows[:4]), size(rows)
    assert few != many and many[1] > few[1]


def test_of_many_variants_those_that_stand_out_are_named():
    def row(name, score, ttft):
        return [
            Answer(SCORE, name, score), Answer(ASPECTS["ttft"], name, ttft, 64, ttft != 1.1),
            Answer(ASPECTS["ttft"], name, 9.0, 32), Answer(ASPECTS["tpot"], name, 0.9, 64),
        ]  # fmt: skip

    made = {"dense": (0.9, 1.0), "fast": (0.9, 2.0), "noise": (1.0, 1.1), "bad": (0.2, 3.0)}
    made |= {f"slow {n}": (0.9, 0.5) for n in range(4)}
    told = sentences(lines(list(made), [a for name, values in made.items() for a in row(name, *values)]))
    assert told == [
        "6 of 7 variants score what dense scores, 90%, or more.", "Below it: bad with 20%.",
        "Of those that keep the score, these prefill clearly faster than dense: fast (2.00 x).",
        "Of those that keep the score, these decode clearly faster than dense: none.",
    ]  # fmt: skip
