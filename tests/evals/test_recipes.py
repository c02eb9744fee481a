"""Recipes: malformed ones in one sentence with file and line, shipped ones valid, runs resumed after a kill."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.recipe.build import build_run
from hfpatch.evals.recipe.recipe import FOLDER, find_recipe, list_recipes, load_recipe
from hfpatch.evals.report.read import read_results
from hfpatch.evals.report.write import write_report
from hfpatch.evals.run.cells import Cell, Session
from hfpatch.evals.run.estimate import Speed, estimate
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.run.results import Journal
from hfpatch.evals.run.runner import execute
from hfpatch.evals.run.variants import parse_variants

from hfpatch import PatchConfig
from hfpatch.errors import HfpatchError

GOOD = """model: MODEL
variants:
  - patch: streaming
    settings: {window: 32}
tasks:
  - {task: niah, lengths: [128, 256], depths: [0, 100], samples: 2}
  - {task: multi_key, lengths: [256], samples: 2, options: {distractors: 3}}
  - {task: perplexity, lengths: [128], samples: 2, buckets: 2}
"""
BAD_RECIPES = {
    "not yaml": ("model: [a\nvariants: all\n", 2, "not valid YAML"),
    "a list": ("- model: a\n", 1, "a recipe is a mapping"),
    "empty": ("", 1, "a recipe is a mapping"),
    "no model": ("variants: all\ntasks: []\n", 1, "needs 'model'"),
    "no variants": ("model: a\ntasks: []\n", 1, "needs 'variants'"),
    "unknown key": (GOOD + "modle: b\n", 9, "no setting 'modle'; did you mean 'model'"),
    "unknown task key": (GOOD.replace("samples: 2}", "smaples: 2}", 1), 6, "no setting 'smaples'"),
    "unknown task": (GOOD.replace("multi_key", "multi_kay"), 7, "no task called 'multi_kay'"),
    "unknown option": (GOOD.replace("distractors", "distracters"), 7, "no option 'distracters'"),
    "unknown method": (GOOD.replace("patch: streaming", "patch: streming"), 3, "did you mean 'streaming'"),
    "unknown setting": (GOOD.replace("window: 32", "windw: 32"), 4, "no setting 'windw'"),
    "setting out of range": (GOOD.replace("window: 32", "window: 0"), 4, "out of range"),
    "setting of wrong type": (GOOD.replace("window: 32", "window: wide"), 4, "wrong type"),
    "negative length": (GOOD.replace("[128, 256]", "[128, -1]"), 6, "at least 16"),
    "text for a number": (GOOD.replace("samples: 2", "samples: two", 1), 6, "must be a whole number"),
    "depth above 100": (GOOD.replace("[0, 100]", "[0, 150]"), 6, "at most 100"),
    "a key twice": (GOOD + "model: b\n", 9, "'model' is set twice"),
    "no task": ("model: a\nvariants:\n  - patch: streaming\n", 1, "nothing to do"),
    "patch and methods": (GOOD.replace("settings: {window: 32}", "methods: [{method: dense}]"), 3, "either 'patch'"),
    "wrong measure": (GOOD + "measures:\n  - measure: speed\n", 10, "must be one of audit, latency, memory"),
    "variants misspelt": ("model: a\nvariants: every\ntasks: []\n", 2, "it must be 'all' or a list"),
    "two jobs alike": (GOOD + "  - {task: niah, lengths: [64]}\n", 9, "two jobs are called 'niah'"),
    "two variants alike": (GOOD.replace("tasks:", "  - patch: streaming:window=32\ntasks:"), 5, "there twice"),
    "python object": ("model: !!python/object/apply:os.getcwd []\nvariants: all\n", 1, "not valid YAML"),
    "whole number with a point": (GOOD.replace("samples: 2", "samples: 1.0", 1), 6, "must be a whole number, not 1.0"),
    "not a number": (GOOD.replace("[0, 100]", "[.nan]"), 6, "must be a number"),
    "endless number": (GOOD.replace("[0, 100]", "[.inf]"), 6, "must be a number"),
    "too many samples": (GOOD.replace("samples: 2", "samples: 99999999", 1), 6, "at most 1000000"),
    "too long": (GOOD.replace("[128, 256]", "[1" + 18 * "0" + "]"), 6, "at most 100000000"),
    "label that leaves the folder": (GOOD.replace("task: niah", "task: niah, label: ../x"), 6, "may hold letters"),
    "label of two lines": (GOOD.replace("task: niah", 'task: niah, label: "x\\n"'), 6, "may hold letters"),
    "lm-eval settings": (GOOD + "  - {task: lm-eval, tasks: [x], settings: {}}\n", 9, "no setting 'settings'"),
    "methods setting": (
        GOOD.replace("patch: streaming\n    settings: {window: 32}", "methods:\n    - method: quest\n      budgt: 3"),
        5, "no setting 'budgt'",
    ),
}  # fmt: skip
BAD_CONFIGS = {
    "not json": ('{"methods": [\n  {"method": "streaming",}', 2, "not valid"),
    "no methods": ('{\n"methods": []}', 2, "non-empty list under 'methods'"),
    "no method": ('{"methods": [\n {"window": 3}]}', 2, "needs a 'method' name"),
    "unknown method": ('{"methods": [\n {\n"method": "quset"}]}', 3, "did you mean 'quest'"),
    "setting": ('{"methods": [{"method": "streaming",\n "sink": 4,\n "widow": 3}]}', 3, "no setting 'widow'"),
    "range": ('{"methods": [{"method": "streaming",\n "sink": -4}]}', 2, "out of range"),
    "extra": ('{"methods": [{"method": "streaming"}],\n "modle": "x"}', 2, "no setting 'modle'"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_malformed_recipe_is_one_sentence_with_file_and_line(tmp_path, name):
    text, line, sentence = BAD_RECIPES[name]
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(HfpatchError) as raised:
        build_run(load_recipe(file))
    told = str(raised.value)
    assert told.startswith(f"{file}:{line}: ") and sentence in told and "\n" not in told


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_malformed_patch_config_is_one_sentence_with_file_and_line(tmp_path, name):
    text, line, sentence = BAD_CONFIGS[name]
    file = tmp_path / "hfpatch_config.json"
    file.write_text(text)
    with pytest.raises(HfpatchError) as raised:
        parse_variants([str(file)])
    told = str(raised.value)
    assert told.startswith(f"{file}:{line}: ") and sentence in told and "\n" not in told


@pytest.mark.parametrize("kind, name", [("recipe", n) for n in BAD_RECIPES] + [("config", n) for n in BAD_CONFIGS])
def test_malformed_file_leaves_the_command_with_one_line_and_code_2(kind, name, tmp_path, monkeypatch, capsys):
    from hfpatch import cli

    text, line, _ = (BAD_RECIPES if kind == "recipe" else BAD_CONFIGS)[name]
    file = tmp_path / ("bad.yaml" if kind == "recipe" else "bad.json")
    file.write_text(text)
    words = {
        "recipe": ["run", str(file), "--out", str(tmp_path / "out")],
        "config": ["niah", "embedded", "-p", str(file)],
    }
    monkeypatch.setattr(sys, "argv", ["hfpatch", *words[kind]])
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = capsys.readouterr()
    assert left.value.code == 2 and told.err.startswith(f"hfpatch: {file}:{line}: ")
    assert len(told.err.splitlines()) == 1 and "Traceback" not in told.err + told.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [p.stem for p in sorted(FOLDER.glob("*.yaml"))])
def test_shipped_recipes_are_valid_and_say_what_they_answer(name, folder):
    found = load_recipe(find_recipe(name))
    assert len(found.data["about"]) > 20 and found.data["output"] == f"out/{name}"
    run = build_run(load_recipe(find_recipe(name), [f"model={folder}"]))
    assert run.variants[0].name == "dense" and len(run.variants) > 1 and run.cells()


OFFLINE = [name for name in list_recipes() if not load_recipe(find_recipe(name)).data.get("needs_network")]
SHORT = {"lengths": [256], "depths": [50], "samples": 1, "decode_tokens": 2, "repeats": 1}
LONG = {"compare-all", "ruler-like", "quickstart", "latency-memory", "infiniretri-beyond-window", "sparse-tour"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in OFFLINE])
def test_every_offline_recipe_runs_in_a_short_profile(name, tmp_path):
    data = load_recipe(find_recipe(name)).data
    parts = {part: data[part] for part in ("tasks", "measures") if part in data}
    if data["variants"] == "all":  # a process per variant: one recipe that measures memory is enough
        parts["measures"] = [m for m in parts["measures"] if m["measure"] != "memory"]
    elif any(m["measure"] == "memory" for m in parts.get("measures", [])):
        parts["variants"] = data["variants"][:1]
    few = parts.pop("variants", data["variants"])
    short = {part: [e | {k: v for k, v in SHORT.items() if k in e} for e in parts[part]] for part in parts}
    overrides = [f"{part}={json.dumps(entries)}" for part, entries in short.items()]
    overrides.append(f"variants={json.dumps(few)}")
    run = build_run(load_recipe(find_recipe(name), overrides))
    results = execute(run, tmp_path)
    assert len(results["jobs"]) == sum(len(entries) for entries in short.values())
    for job in results["jobs"]:
        assert {row["variant"] for row in job["rows"]} == {v.name for v in run.variants}
        if job["kind"] == "niah":
            assert job["rows"][0] | {"variant": "dense", "score": 1.0} == job["rows"][0]
    assert write_report(results, tmp_path)[-1].name == "report.html"
    assert timeless(read_results(tmp_path)) == timeless(results), "what a run writes is what reading asks for"


def test_unknown_recipe_has_near_names():
    assert "quickstart" in list_recipes()
    with pytest.raises(EvaluationError, match="did you mean 'quickstart'"):
        find_recipe("quick-start")


def recipe(tmp_path, folder, text=GOOD):
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("MODEL", folder))
    return file


def test_overrides_reach_jobs_by_name_and_are_checked(tmp_path, folder):
    file = recipe(tmp_path, folder)
    run = build_run(
        load_recipe(file, ["seed=3", "niah.samples=5", "tasks.0.lengths=[64]", "variants.0.settings.window=9"])
    )
    assert (run.seed, run.jobs[0].samples, run.jobs[0].lengths) == (3, 5, [64])
    assert run.variants[1].config.methods[0].window == 9
    for override, sentence in {
        "niah.smaples=1": "no setting 'smaples'", "seed": "not of the form", "tasks.9.samples=1": "there is no '9'",
        "niah.samples=none": "must be a whole number",
    }.items():  # fmt: skip
        with pytest.raises(HfpatchError, match=sentence):
            load_recipe(file, [override])


def timeless(results):
    data = json.loads(json.dumps(results))
    data.pop("seconds")
    return data


def start(file, out):
    torch.set_num_threads(1)
    execute(build_run(load_recipe(file)), out)


def test_killed_run_resumes_to_the_same_results(tmp_path, folder):
    file = recipe(tmp_path, folder, GOOD.replace("depths: [0, 100], samples: 2", "depths: [0, 100], samples: 10"))
    whole = execute(build_run(load_recipe(file)), tmp_path / "whole")
    journal = tmp_path / "killed" / "cells.jsonl"
    process = multiprocessing.get_context("fork").Process(target=start, args=(file, journal.parent))
    process.start()
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 2):
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = journal.read_text().split("\n")[:-1]
    assert process.exitcode == -signal.SIGKILL and not (journal.parent / "results.json").exists()
    assert 2 <= len(before) < 1 + 8
    with journal.open("a") as torn:
        torn.write('{"cell": "niah | dense | 256", "da')
    resumed = execute(build_run(load_recipe(file)), journal.parent)
    assert timeless(resumed) == timeless(whole)
    assert journal.read_text().split("\n")[: len(before)] == before
    samples = (journal.parent / "samples.jsonl").read_text()
    assert samples == (tmp_path / "whole" / "samples.jsonl").read_text()
    assert samples.count("\n") == 2 * (2 * 20 + 2 + 2)


def test_finished_run_is_not_repeated_and_other_arguments_are_refused(tmp_path, folder, monkeypatch):
    file = recipe(tmp_path, folder)
    first = execute(build_run(load_recipe(file)), tmp_path / "out")
    monkeypatch.setattr("hfpatch.evals.jobs.niah.NiahJob.run", None)
    assert timeless(execute(build_run(load_recipe(file)), tmp_path / "out")) == timeless(first)
    assert timeless(read_results(tmp_path / "out")) == timeless(first)
    with pytest.raises(EvaluationError, match="other arguments"):
        execute(build_run(load_recipe(file, ["seed=1"])), tmp_path / "out")


def test_one_of_two_processes_does_its_share_and_one_alone_finishes_it(tmp_path, folder, monkeypatch):
    file = recipe(tmp_path, folder)
    alone = execute(build_run(load_recipe(file)), tmp_path / "alone")
    monkeypatch.setattr("hfpatch.evals.run.shards.Shard.barrier", lambda self: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "shared"
    Journal(out / "cells.jsonl", build_run(load_recipe(file)).arguments()).open()
    monkeypatch.setenv("RANK", "1")
    assert execute(build_run(load_recipe(file)), out) is None
    mine = Journal(out / "cells.1.jsonl", build_run(load_recipe(file)).arguments()).open().done
    assert 0 < len(mine) < len(build_run(load_recipe(file)).cells())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert timeless(execute(build_run(load_recipe(file)), out)) == timeless(alone)
    assert not list(out.glob("cells.*.jsonl"))


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_scores_as_one_process(tmp_path, folder):
    file = recipe(tmp_path, folder)
    alone = execute(build_run(load_recipe(file)), tmp_path / "alone")
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "-m", "hfpatch.cli", "run", str(file), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = timeless(read_results(tmp_path / "two"))
    assert [j["rows"] for j in two["jobs"]] == [j["rows"] for j in timeless(alone)["jobs"]]


def test_estimate_counts_prompts_and_grows_with_length(tmp_path, folder, model, tokenizer):
    text = GOOD + "measures:\n  - {measure: latency, lengths: [64, 2048], decode_tokens: 4, repeats: 3}\n"
    run = build_run(load_recipe(recipe(tmp_path, folder, text)))
    session = Session(folder, run.variants)
    session.loaded = Loaded(folder, model, tokenizer)
    niah, key, _, latency = estimate(run, session, Speed(linear=1.0, square=0.5, token=2.0, load=3.0))
    assert (niah.cells, niah.prompts, key.prompts, latency.prompts) == (4, 16, 4, 20)
    assert niah.seconds == sum(8 * (2 * (n + n * n / 2) + 20) for n in (128, 256))
    assert latency.peak > niah.peak > sum(p.numel() * 4 for p in model.parameters())


def test_variants_all_are_all_that_need_no_training_with_their_own_settings(tmp_path, folder):
    text = f"model: {folder}\nvariants: all\nsettings:\n  streaming: {{window: 9}}\n"
    text += "tasks: [{task: niah, lengths: [64]}]\n"
    file = recipe(tmp_path, folder, text)
    run = build_run(load_recipe(file))
    configs = {v.name: v.config for v in run.variants}
    assert {"dense", "streaming", "quest", "dense through hfpatch"} <= set(configs) and configs["dense"] is None
    assert configs["streaming"].methods[0].window == 9
    assert "gated" not in configs and any(n.startswith("gated is left out") for n in run.notes)
    for wrong, line, sentence in (("window: 0", 4, "out of range"), ("windw: 3", 4, "no setting 'windw'")):
        file.write_text(text.replace("window: 9", wrong))
        with pytest.raises(HfpatchError, match=rf":{line}: .*{sentence}"):
            build_run(load_recipe(file))


def test_cells_are_named_by_job_variant_and_length():
    assert Cell("niah", "dense", 512).key == "niah | dense | 512"


def test_good_patch_config_with_lines_is_read(tmp_path):
    (_, made) = parse_variants(["streaming:window=7"])
    made.config.save_pretrained(tmp_path)
    assert parse_variants([str(tmp_path)])[1].config == PatchConfig.from_pretrained(tmp_path)
