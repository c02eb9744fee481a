"""The embedded model retrieves, offline and for the right reason; its training runs and resumes."""

import json
import socket
import time

import pytest
import torch
from hfpatch.evals import testbed
from hfpatch.evals.testbed.evaluate import cell
from hfpatch.evals.testbed.train import main as train

from hfpatch import PatchConfig, patched
from hfpatch.text import grammar


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


def test_finds_ten_needles_at_512_tokens(loaded):
    start = time.monotonic()
    rows = cell(*loaded, "single", "prose", 512, samples=10)
    assert sum(hit for _, hit in rows) >= 9
    assert time.monotonic() - start < 20


def test_needles_are_lost_when_attention_to_them_is_masked(loaded):
    rows = cell(*loaded, "single", "prose", 512, samples=10, mask_facts=True)
    assert sum(hit for _, hit in rows) == 0


@pytest.mark.parametrize(
    "words", ["héllo ✨ 日本語 \U0001f9ea", "  two  spaces\n\n\ttab ", "1234567 3.14 ½", "\x00\x7f", "naïve—“quote”"]
)
def test_any_utf8_survives_the_tokenizer(loaded, words):
    tokenizer = loaded[1]
    ids = tokenizer(words)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == words


def test_numbers_split_into_chunks_of_up_to_three_digits(loaded):
    assert loaded[1].tokenize("4821937") == ["482", "193", "7"]


def test_loads_within_a_second_without_a_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    start = time.monotonic()
    model, _ = testbed.load(torch.bfloat16)
    assert time.monotonic() - start < 1
    assert model.dtype == torch.bfloat16 and not model.training


def test_checkpoint_stays_small():
    assert sum(path.stat().st_size for path in testbed.CHECKPOINT.iterdir()) <= 8_000_000


def test_every_task_has_facts_and_turns():
    import random

    for name, make in grammar.TASKS.items():
        task = make(random.Random(0))
        assert task.facts and task.turns, name
        assert 0 <= task.target < len(task.facts), name
        for prompt, answer in task.turns:
            assert not prompt.endswith(" ") and answer.startswith(" "), name


@pytest.mark.slow
def test_short_training_lowers_the_loss_and_resumes(tmp_path):
    options = ["--out", str(tmp_path), "--log-every", "20", "--last-stage", "0"]
    train([*options, "--minutes", "2"])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss96"] < 0.8 * rows[0]["loss96"]
    train([*options, "--minutes", "2.2", "--resume"])
    resumed = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert resumed["step"] > rows[-1]["step"] and resumed["seconds"] >= 2.2 * 60
    assert resumed["loss96"] < 0.8 * rows[0]["loss96"]


def test_saved_patches_name_the_embedded_model_and_no_folder(loaded, tmp_path):
    with patched(loaded[0], "streaming") as patch:
        patch.config.save_pretrained(tmp_path)
    assert PatchConfig.from_pretrained(tmp_path).base_model_name_or_path == "embedded"
