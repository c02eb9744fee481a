"""lm-eval on patched models: the same digits unpatched, the same scores at any batch size, the patch on record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hfpatch.evals.tasks import LM_EVAL_FOLDER
from methods_list import METHODS
from test_tasks import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hfpatch import ConfigError, get_patch, patch_model

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hfpatch.integrations import lm_eval as bridge  # noqa: E402
from hfpatch.integrations.lm_eval import HFPatchLM  # noqa: E402
from hfpatch.integrations.merged_report import merge_reports  # noqa: E402
from hfpatch.integrations.right_padding import RightPadding  # noqa: E402

CHOICE = """
task: choice
dataset_path: ""
output_type: multiple_choice
test_split: test
custom_dataset: !function hfpatch.evals.tasks.harness.docs
dataset_kwargs: {hfpatch_task: few_shot, shots: 3}
doc_to_text: "{{prompt}}"
doc_to_choice: [animal, plant, tool, place]
doc_to_target: "{{answers[0]}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {version: 1.0}
"""
TASKS = ["hfpatch_passkey", "hfpatch_perplexity", "choice"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved random Llama over bytes."""
    where = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    return str(where)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """The folder of a task with choices of different lengths."""
    where = tmp_path_factory.mktemp("tasks")
    (where / "choice.yaml").write_text(CHOICE, encoding="utf-8")
    return str(where)


def evaluate(model: str, folder: str, tasks: str, batch_size: int = 2, **model_args):
    """Results of TASKS."""
    manager = TaskManager(
        include_path=[str(LM_EVAL_FOLDER), tasks],
        include_defaults=False,
        metadata={"tokenizer": folder, "length": 420, "samples": 3},
    )
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": folder, "device": "cpu", "dtype": "float32", **model_args},
        tasks=TASKS,
        batch_size=batch_size,
        task_manager=manager,
        bootstrap_iters=0,
    )


def digits(results) -> dict:
    """Scores, and the responses they were made of."""
    return {
        task: (results["results"][task], [s["filtered_resps"] for s in results["samples"][task]]) for task in TASKS
    }


def requests(kind: str) -> list[Instance]:
    """Requests whose prompts differ much in length."""
    words = "the quick otter hides a brown lantern near an old harbour "
    texts = [(words * 4)[a : a + n] for n, a in ((150, 0), (31, 3), (77, 9), (8, 1), (111, 20), (149, 2), (63, 5))]
    if kind == "generate_until":
        arguments = [(t, {"until": ["\n"], "max_gen_toks": 6}) for t in texts]
    else:
        arguments = [(t, told) for t in texts for told in (" red", " a fox\x00\x00", "!")]
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def model(folder: str, **kwargs) -> HFPatchLM:
    return HFPatchLM(folder, device="cpu", dtype="float32", **kwargs)


@pytest.fixture(scope="module")
def plain(folder, tasks):
    """What `--model hf` gives."""
    return digits(evaluate("hf", folder, tasks))


def test_unpatched_gives_the_digits_of_hf(folder, tasks, plain):
    results = evaluate("hfpatch", folder, tasks)
    assert digits(results) == plain
    assert results["config"]["patch"] is None


def test_a_patch_changes_scores_and_is_on_record(folder, tasks, plain):
    results = evaluate("hfpatch", folder, tasks, patch="streaming", patch_sink=2, patch_window=8)
    assert digits(results) != plain
    config = json.loads(json.dumps(results["config"], default=str))
    (method,) = config["patch"]["methods"]
    assert (method["method"], method["sink"], method["window"]) == ("streaming", 2, 8)
    report = config["patch_report"]
    assert set(report["density_by_phase"]) == {"decode", "prefill"}
    assert 0 < report["density"] < 0.2
    assert report["fallbacks"] == {} and report["processes"] == 1
    assert {line["layer"] for line in report["lines"]} == {0, 1}


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_scores_are_the_same_at_batch_size_1_and_8(folder, case):
    alone = model(folder, batch_size=1, patch=case.name, patch_args=case.settings)
    together = model(folder, batch_size=8, patch=case.name, patch_args=case.settings)
    first, second = (lm.loglikelihood(requests("loglikelihood"), disable_tqdm=True) for lm in (alone, together))
    assert [x[0] for x in second] == pytest.approx([x[0] for x in first], abs=2e-4)
    assert [x[1] for x in second] == [x[1] for x in first]
    told = [lm.generate_until(requests("generate_until"), disable_tqdm=True) for lm in (alone, together)]
    assert told[0] == told[1]
    reports = [get_patch(lm.model).report() for lm in (alone, together)]
    assert reports[1].density("prefill") == pytest.approx(reports[0].density("prefill"), rel=0.05)
    assert reports[0].fallbacks() == reports[1].fallbacks() == {}


def test_padding_has_to_be_told_to_methods_that_look_at_the_last_queries(folder, monkeypatch):
    settings = {"sink": 2, "window": 8, "question_tokens": 5}
    scores = []
    for told in (True, False):
        if not told:
            monkeypatch.setattr(RightPadding, "mask", lambda self, ids: None)
        lm = model(folder, batch_size=8, patch="streaming", patch_args=settings)
        scores.append([x[0] for x in lm.loglikelihood(requests("loglikelihood"), disable_tqdm=True)])
    assert scores[0] != pytest.approx(scores[1], abs=1e-2)


def test_right_padding_is_found_by_the_tokens():
    rows = [[5, 6, 7, 0], [5, 6], [0, 0, 0], [9]]
    padded = RightPadding(rows)
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 0, 0, 0], [0, 0, 0, 0, 0], [9, 0, 0, 0, 0], [8, 8, 0, 0, 0]])
    assert padded.lengths(ids) == [4, 2, 3, 1, 5]
    assert padded.mask(ids)[1].tolist() == [1, 1, 0, 0, 0]
    assert padded.mask(ids[4:]) is None
    assert RightPadding([]).mask(torch.ones(2, 3, dtype=torch.long)) is None


def test_parallelize_patches_after_placement(folder):
    lm = model(folder, parallelize=True, patch="streaming", patch_window=8)
    alone = model(folder, patch="streaming", patch_window=8)
    assert lm.loglikelihood(requests("loglikelihood"), disable_tqdm=True) == alone.loglikelihood(
        requests("loglikelihood"), disable_tqdm=True
    )
    assert get_patch(lm.model).layers == [0, 1]


def test_a_loaded_model_is_patched_too(folder):
    loaded = LlamaForCausalLM.from_pretrained(folder)
    lm = HFPatchLM(loaded, tokenizer=byte_tokenizer(), patch="streaming")
    assert lm.patch is get_patch(loaded)
    patched = patch_model(LlamaForCausalLM.from_pretrained(folder), "streaming", window=8)
    assert HFPatchLM(patched, tokenizer=byte_tokenizer()).patch.config.methods[0].window == 8


def test_a_saved_patch_is_read(folder, tmp_path):
    first = model(folder, patch="streaming", patch_window=8)
    get_patch(first.model).save_pretrained(tmp_path)
    again = model(folder, patch=str(tmp_path))
    assert again.patch.config.to_dict()["methods"] == first.patch.config.to_dict()["methods"]


def test_lm_evals_plain_argument_text(folder):
    text = f"pretrained={folder},dtype=float32,patch=dense+streaming,patch_window=8,patch_layers=1"
    lm = HFPatchLM.create_from_arg_string(text, {"device": "cpu", "batch_size": 2, "max_batch_size": None})
    assert (lm.patch.layers, lm.patch.config.methods[1].window) == ([1], 8)


@pytest.mark.slow
def test_unknown_task_is_told_in_a_sentence(folder):
    with pytest.raises(ConfigError, match="Tasks not found: nosuch; `ls tasks`"):
        bridge.main(["--model_args", f"pretrained={folder}", "--tasks", "nosuch", "--device", "cpu"])


def test_loose_methods_warn_once_or_refuse(folder, caplog):
    settings = {"sink": 2, "window": 8, "question_tokens": 5}
    lm = model(folder, patch="streaming", patch_args=settings)
    some = requests("loglikelihood")[:2]
    for _ in range(2):
        lm.loglikelihood(some, disable_tqdm=True)
    assert sum("influence its own score" in r.message for r in caplog.records) == 1
    refusing = model(folder, patch="streaming", patch_args=settings, strict=True)
    for _ in range(2):
        with pytest.raises(ConfigError, match="leave out strict=True"):
            refusing.loglikelihood(some, disable_tqdm=True)
    assert refusing.generate_until(requests("generate_until")[:1], disable_tqdm=True)
    caplog.clear()
    model(folder, patch="streaming", strict=True).loglikelihood(some, disable_tqdm=True)
    assert not [r for r in caplog.records if r.name.startswith("hfpatch")]


def test_methods_that_act_in_decoding_say_that_loglikelihood_does_not_use_them(folder, caplog):
    lm = model(folder, patch="streaming", patch_window=8, patch_phase="decode")
    lm.loglikelihood(requests("loglikelihood")[:2], disable_tqdm=True)
    assert "without it" in caplog.text


def test_reports_of_several_processes_add_up(folder):
    lm = model(folder, patch="streaming", patch_window=8)
    lm.loglikelihood(requests("loglikelihood")[:2], disable_tqdm=True)
    one = lm.patch.report()
    two = merge_reports([one.to_dict(), one.to_dict()])
    assert two["processes"] == 2
    assert two["density"] == pytest.approx(one.density())
    assert [x["calls"] for x in two["lines"]] == [2 * x.stats.calls for x in one.lines]
    assert two["lines"][0]["executors"] == {k: 2 * v for k, v in one.lines[0].stats.executors.items()}


def command(folder: str, out: Path, *launcher: str) -> dict:
    """Results that lm-eval's command has written."""
    args = [
        *("--model_args", f"pretrained={folder},dtype=float32,patch=streaming,patch_sink=2,patch_window=16"),
        *("--tasks", "hfpatch_niah,hfpatch_perplexity", "--metadata", "length=420", "samples=5"),
        *("--batch_size", "2", "--device", "cpu", "--output_path", str(out)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([sys.executable, *launcher, "-m", "hfpatch.integrations.lm_eval", *args], check=True, env=env)
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_launch_of_one_process_instead_of_several_is_told(folder, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    model(folder)
    assert "started one" in caplog.text


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(folder, tmp_path):
    one = command(folder, tmp_path / "one")
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    two = command(folder, tmp_path / "two", *launcher)
    for task, scores in one["results"].items():
        for name, value in scores.items():
            told = two["results"][task][name]
            assert told == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    first, second = one["config"]["patch_report"], two["config"]["patch_report"]
    assert (first["processes"], second["processes"]) == (1, 2)
    assert second["density"] == pytest.approx(first["density"], rel=0.05)
