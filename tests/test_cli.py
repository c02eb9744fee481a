"""The `hfpatch` command: what it prints, what it writes, and one sentence with exit code 2 for bad input."""

import json
import sys

import pytest
from hfpatch.evals.run.variants import parse_settings, parse_variants
from tiny_llama import save_tiny

from hfpatch import PatchConfig, cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns exit code, output, errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["hfpatch", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("hfpatch.cli.console.console._width", 200)
        with pytest.raises(SystemExit) as left:
            cli.main()
            raise SystemExit(0)
        out = capsys.readouterr()
        return left.value.code or 0, out.out, out.err

    return call


def test_list_shows_methods_and_presets(run):
    code, out, _ = run("list")
    assert code == 0 and "sink tokens + recent window" in out and "preset tri-shape: sink=128" in out
    assert "arXiv 2309.17453" in out


def test_list_one_method_shows_its_settings(run):
    code, out, _ = run("list", "streaming")
    assert code == 0 and "most recent tokens visible" in out and "1024" in out
    assert run("list", "streeming")[0] == 2
    assert "drops keys from the cache" in run("list", "snapkv")[1]
    assert "changes nothing" in run("list", "dense")[1]


def test_env(run):
    code, out, _ = run("env")
    assert code == 0 and "transformers" in out and "threads" in out


def test_check_tells_each_layer(run, folder):
    code, out, _ = run("check", folder, "--patch", "streaming", "--set", "dense_layers=1")
    assert code == 0 and "patches 1 of 2 layers" in out and "model.layers.1.self_attn" in out
    code, out, _ = run("check", folder)
    assert code == 0 and "streaming" in out and "2 layers" in out


def test_check_refuses_what_patch_model_refuses(run, folder):
    code, _, err = run("check", folder, "--patch", "streaming", "--set", "dense_layers=2")
    assert code == 2 and "would patch none of the 2 attention layers" in err
    code, out, err = run("check", folder, "--patch", "dhsa-paper")
    assert code == 2 and "needs a trained predictor" in err and not out.strip()


def test_niah_writes_results_samples_and_plot(run, folder, tmp_path):
    out = tmp_path / "niah"
    code, text, err = run(
        "niah", folder, "-p", "streaming:window=32", "--lengths", "128,256", "--depths", "0,100", "--samples", 2,
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().split("\n")[:-1]]
    assert len(samples) == 2 * 2 * 2 * 2 and len(results["jobs"][0]["rows"]) == 8
    assert results["environment"]["versions"]["transformers"] and results["model"]["class"] == "LlamaForCausalLM"
    assert (out / "niah.png").read_bytes().startswith(b"\x89PNG")
    assert "streaming:window=32" in text and "needles found" in text


def test_bench_writes_results_and_plots(run, folder, tmp_path):
    code, text, err = run(
        "bench", folder, "-p", "streaming", "--set", "window=32", "--lengths", "64,257", "--decode-tokens", 2,
        "--repeats", 1, "--no-memory", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    (job,) = json.loads((tmp_path / "results.json").read_text())["jobs"]
    assert [r["length"] for r in job["rows"]] == [64, 64, 257, 257] and len(job["break_even"]) == 2
    assert (tmp_path / "latency.png").is_file() and "x dense" in text


def test_inspect_draws_one_layer_and_says_what_it_saw(run, folder, tmp_path):
    words = ("inspect", folder, "--length", "257", "--layer", "1", "--head", "1", "--out", tmp_path)
    code, text, err = run(*words, "-p", "block_topk:budget=64,block_q=16,block_k=16,min_length=0")
    assert code == 0 and "layer 1" in text and "chunks" not in text, err
    assert (tmp_path / "layer-1-head-1.png").read_bytes()[:4] == b"\x89PNG"
    code, text, _ = run(*words, "-p", "dhsa:budget=64,sink=4,local=8,block_q=16,question_tokens=0")
    assert code == 0 and "chunks of" in text and "257 tokens" in text
    code, _, err = run(*words, "-p", "zerotuning")
    assert code == 2 and err.strip().endswith("nothing to draw.")
    code, _, err = run(*words, "-p", "keydiff")
    assert code == 2 and "What keydiff keeps in the cache, report() says" in err
    code, _, err = run(
        *words[:-4], "--head", "9", "-p", "quest+block_topk:budget=64,block_q=16,block_k=16,min_length=0"
    )
    assert code == 2 and "no head 9" in err
    code, _, err = run(*words)
    assert code == 2 and "Name one patch" in err


@pytest.mark.parametrize("words", [[], ["calibrate"], ["--help"], ["niah", "--help"]])
def test_help_is_shown(run, words):
    code, out, err = run(*words)
    assert code in (0, 2) and "Usage" in out + err and "hfpatch: " not in err


BAD = {
    "near name": (["niah", "F", "-p", "streming"], "did you mean 'streaming'"),
    "setting": (["niah", "F", "-p", "streaming", "-s", "windw=3"], "No patch has a setting 'windw'"),
    "range": (["niah", "F", "-p", "streaming", "-s", "window=0"], "out of range"),
    "type": (["niah", "F", "-p", "streaming", "-s", "window=wide"], "wrong type"),
    "pair": (["niah", "F", "-p", "streaming", "-s", "window"], "not of the form name=value"),
    "json": (["niah", "F", "-p", "streaming", "--patch-args", "{window: 3}"], "not valid JSON"),
    "twice": (["niah", "F", "-p", "streaming", "-p", "streaming"], "there twice"),
    "inline": (["niah", "F", "-p", "streaming:window"], "not of the form name=value"),
    "no patch": (["niah", "F", "-s", "window=3"], "name a patch"),
    "config": (["niah", "F", "-p", "./nothing/here"], "neither a folder"),
    "lengths": (["niah", "F", "--lengths", "long"], "--lengths 'long' cannot be read"),
    "depths": (["niah", "F", "--depths", "0,150"], "at most 100"),
    "samples": (["niah", "F", "--samples", "0"], "at least 1"),
    "haystack": (["niah", "F", "--haystack", "no-such-file.txt"], "no haystack"),
    "short": (["niah", "F", "--lengths", "32"], "tokens are too few"),
    "dtype": (["niah", "F", "--dtype", "int3"], "dtype 'int3'"),
    "model": (["niah", "./no-such-model"], "Cannot load"),
    "device": (["niah", "F", "--device", "toaster"], "no device 'toaster'"),
    "positions": (["niah", "F", "--lengths", "64k"], "positions for 4096 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_code_2(run, folder, tmp_path, name):
    words, sentence = BAD[name]
    code, _, err = run(*(folder if w == "F" else w for w in words), "--out", tmp_path)
    assert code == 2 and sentence in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_missing_extra_is_one_sentence(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.delitem(sys.modules, "hfpatch.evals.recipe.recipe", raising=False)
    code, _, err = run("run", "quickstart", "--out", tmp_path)
    assert code == 2 and err.strip() == "hfpatch: this command needs jsonschema; run `pip install 'hfpatch[eval]'`."


def test_variants_are_named_and_composed():
    names = [
        v.name for v in parse_variants(["streaming:window=7,sink=2", "dense", "streaming+dense"], {"layers": "0-1"})
    ]
    assert names == [
        "dense", "streaming:layers=0-1,window=7,sink=2", "dense:layers=0-1", "streaming:layers=0-1+dense:layers=0-1",
    ]  # fmt: skip
    (_, both) = parse_variants(["streaming:layers=0-3,8,sink=2+dense"])
    assert [m.method for m in both.config.methods] == ["streaming", "dense"]
    assert (both.config.methods[0].layers, both.config.methods[0].sink) == ("0-3,8", 2)


def test_dense_through_hfpatch_is_a_variant_of_its_own():
    assert [v.name for v in parse_variants(["dense"])] == ["dense", "dense through hfpatch"]


def test_saved_config_is_a_variant(tmp_path):
    (_, made) = parse_variants(["streaming"], {"window": 9})
    made.config.save_pretrained(tmp_path / "mine")
    (_, read) = parse_variants([str(tmp_path / "mine")])
    assert read.name == "mine" and read.config.to_dict() == made.config.to_dict()
    assert isinstance(read.config, PatchConfig)


def test_settings_are_read_as_json_where_they_are():
    assert parse_settings(["a=1", "b=x", "c=[1, 2]", "d=true"], '{"e": null}') == {
        "e": None, "a": 1, "b": "x", "c": [1, 2], "d": True,
    }  # fmt: skip
