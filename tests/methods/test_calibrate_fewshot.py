"""Few-shot prompts from texts and labels, their shared beginnings, and the report on unseen examples."""

import json
import math
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_calibrate_reweighting import Letters, labelled, make_texts

import hfpatch
from hfpatch import patched
from hfpatch.calibrate.classification import Answers, Example, Questions, Source, make_examples
from hfpatch.calibrate.fewshot import CONTENT_FREE, DRAWS, fewshot_prompts, task_prompts
from hfpatch.calibrate.prefix import SHORTEST, grouped
from hfpatch.calibrate.zerotuning import Search, calibrate_zerotuning, factors, most_settings, summary
from hfpatch.calibrate.zerotuning_report import blank_prior, change_by
from hfpatch.runtime.model_facts import query_heads
from hfpatch.text.labelled import BAD, GOOD, LIKED, LOATHED, SUBJECTS, TASKS


@pytest.mark.parametrize("name", sorted(TASKS))
def test_texts_are_many_different_balanced_and_seeded(name: str) -> None:
    task = TASKS[name]
    rows = task.rows(1200, seed=1)
    assert len({text for text, _ in rows}) == 1200 and rows == task.rows(1200, seed=1) != task.rows(1200, seed=2)
    counts = [sum(label == known for _, label in rows) for known in task.labels]
    assert sum(counts) == 1200 and max(counts) - min(counts) <= 1
    assert not any(label in text.lower().split() for text, _ in rows for label in task.labels)


def test_more_texts_than_there_are_are_refused() -> None:
    with pytest.raises(hfpatch.ConfigError, match="ask for fewer"):
        TASKS["subject"].rows(20_000)


def test_words_are_on_one_side_only() -> None:
    assert not set(GOOD) & set(BAD) and not set(LIKED) & set(LOATHED)
    parts = [part for lists in SUBJECTS.values() for words in lists for part in words.split("|")]
    assert len(parts) == len(set(parts))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompts_show_as_many_of_each_label_and_never_ask_what_they_show(name: str) -> None:
    task, shots = TASKS[name], 4
    made = make_examples(task_prompts(name, 60, shots), name)
    assert len({e.prompt for e in made}) == 60 and made == make_examples(task_prompts(name, 60, shots), name)
    heads = {e.prompt.rpartition("Text: ")[0] for e in made}
    assert len(heads) == DRAWS and all(h.startswith(task.instruction) for h in heads)
    for head in heads:
        assert all(head.count(f"{task.cue} {label}\n") == shots // len(task.labels) for label in task.labels)
    shown = "".join(heads)
    assert not any(e.prompt.rpartition("Text: ")[2].split("\n")[0] in shown for e in made)
    for e in made:
        head, _, text = e.prompt.rpartition("Text: ")
        assert e.prompt.endswith(task.cue) and e.labels == tuple(f" {label}" for label in task.labels)
        assert (text.split("\n")[0], str(e.answer)[1:]) in task.rows(60 + DRAWS * shots)
        assert e.blanks == tuple(f"{head}Text: {free}\n{task.cue}" for free in CONTENT_FREE)


def test_own_texts_and_labels_from_json_lines_and_tables(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": ("yes", "no")[n % 2]} for n in range(40)]
    lines, table = tmp_path / "mine.jsonl", tmp_path / "mine.csv"
    lines.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    table.write_text("text,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in rows), encoding="utf-8-sig")
    made = Source(str(lines), shots=2).load(10)
    assert made == Source(str(table), shots=2).load(10) and len(made) == 10
    assert made[0].labels == (" no", " yes") and made[0].prompt.count("Label: ") == 2
    assert all(rows[int(e.prompt.split("Text: t")[-1].split("\n")[0])]["label"] == str(e.answer)[1:] for e in made)
    other = Source(str(table), shots=0, prompt="Q: {text} A:", names="a,b")
    with pytest.raises(hfpatch.ConfigError, match="not a number below 2"):
        other.load(10)
    table.write_text("text,label\nt0,0\nt1,1\n", encoding="utf-8")
    assert {(e.prompt, e.answer) for e in other.load(10)} == {("Q: t0 A:", " a"), ("Q: t1 A:", " b")}
    for source, sentence in (
        (Source(str(table), shots=2, prompt="{body}:"), "cannot be filled"),
        (Source(str(table), shots=4), "lower --shots"),
        (Source(str(table), shots=0, answer="stars"), "has no 'stars'"),
        (Source(str(lines), answer="stars"), "needs a 'prompt'"),
        (Source(str(tmp_path / "none.csv")), "cannot be read"),
    ):
        with pytest.raises(hfpatch.ConfigError, match=sentence):
            source.load(10)
    with pytest.raises(hfpatch.ConfigError, match="--answer"):
        fewshot_prompts([{"text": "a", "label": ""}], "{text}", "label", 0, 1)


def test_prompts_with_the_same_beginning_share_it() -> None:
    long, other = list(range(SHORTEST)), list(range(1, SHORTEST + 1))
    ids = [[*long, 50, 51, 1], [*other, 2], [*long, 50, 51, 2, 3], [*long, 50, 51, 9], [7]]
    groups = grouped(ids, 8, share=True)
    assert [g.prefix.tolist() for g in groups] == [[*long, 50, 51], [], []]
    found = {
        int(b.rows[k]): [*g.prefix.tolist(), *b.ids[k, : int(b.ends[k]) + 1].tolist()]
        for g in groups for b in g.batches for k in range(len(b.rows))
    }  # fmt: skip
    assert [found[n] for n in range(5)] == ids
    assert (groups[0].shortest, groups[0].longest) == (SHORTEST + 3, SHORTEST + 4)
    assert [b.rows.tolist() for b in groups[0].batches] == [[0, 3, 2]]
    assert [b.rows.tolist() for b in grouped(ids, 2, share=True)[0].batches] == [[0, 3], [2]]
    assert all(int(b.ends.min()) == b.ids.shape[1] - 1 for b in grouped(ids, 8)[0].batches)
    twice = grouped([[*long, 5], [*long, 5]], 8, share=True)[0]
    assert twice.prefix.tolist() == long and twice.batches[0].ids.tolist() == [[5], [5]]
    assert not grouped(ids, 8)[0].prefix.numel()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "falcon_h1"])
def test_answers_are_the_same_with_a_shared_beginning(kind: str) -> None:
    model = zoo.SUPPORTED[kind].build()
    examples = [Example("abcdefghijklmnopqrstuvwxyz" + t, ("a", "b"), "a") for t in make_texts(9, 6)]
    whole, shared = Questions(Letters(), examples, 4), Questions(Letters(), examples, 4, share=True)
    assert len(shared.groups[0].prefix) == 27
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args, kw: seen.append(args[0].numel()), with_kwargs=True)
    for gamma in (1.0, 5.0):
        with patched(model, "zerotuning", gamma=gamma, heads=[1]):
            want, got = whole.ask(model), shared.ask(model)
        assert torch.equal(want.token, got.token) and torch.allclose(want.labels, got.labels, atol=1e-4)
        assert torch.allclose(want.entropy, got.entropy, atol=1e-4)
    hook.remove()
    plain = sum(b.ids.numel() for g in whole.groups for b in g.batches)
    own = sum(b.ids.numel() + (27 * len(b.rows) if kind == "falcon_h1" else 0) for b in shared.groups[0].batches)
    assert sum(seen) == 2 * (plain + 27 + own)


def test_models_that_cannot_branch_read_every_prompt_whole() -> None:
    model = zoo.SUPPORTED["llama"].build()
    plain = model.forward
    model.forward = wraps(plain)(lambda *a, **k: plain(*a, **{**k, "use_cache": False}))
    examples = [Example("abcdefghijklmnopqrstuvwxyz" + t, ("a", "b"), "a") for t in make_texts(5, 6)]
    whole, shared = Questions(Letters(), examples).ask(model), Questions(Letters(), examples, share=True).ask(model)
    assert torch.allclose(whole.labels, shared.labels, atol=1e-5)


def test_the_change_of_accuracy_splits_into_validity_and_what_is_valid() -> None:
    def bools(count: int, of: int = 100) -> Any:
        return torch.arange(of) < count

    more_valid = change_by(bools(40), bools(50), bools(80), bools(100))
    assert math.isclose(more_valid["validity"][0], 0.4) and math.isclose(
        more_valid["accuracy_of_valid"][0], 0.0, abs_tol=1e-12
    )
    better = change_by(bools(40), bools(100), bools(60), bools(100))
    assert better["validity"] == [0.0, 0.0, 0.0] and math.isclose(better["accuracy_of_valid"][0], 0.2)
    low, high = better["accuracy_of_valid"][1:]
    assert 0.1 < low < 0.2 < high < 0.3
    both = change_by(bools(30), bools(50), bools(60), bools(80))
    assert math.isclose(sum(part[0] for part in both.values()), 0.3)
    nothing = change_by(bools(0), bools(0), bools(30), bools(60))
    assert math.isclose(nothing["validity"][0], 0.3) and nothing["accuracy_of_valid"][0] == 0.0


def test_the_prior_of_blanks_by_hand() -> None:
    q = Questions(Letters(), [Example("x", ("a", "b"), "a", ("m", "n")), Example("y", ("b",), "b", ("n",))])
    blanks = Questions(Letters(), [Example("m", ("a", "b")), Example("n", ("a", "b"))])
    log = torch.tensor([[0.06, 0.02], [0.2, 0.2]]).log()
    prior = blank_prior(q, blanks, Answers(torch.zeros(2), log, torch.zeros(2)))
    assert torch.allclose(prior[0], torch.tensor([(0.75 + 0.5) / 2, (0.25 + 0.5) / 2]).log())
    assert prior[1].tolist() == [0.0, 0.0]
    a = Answers(torch.zeros(2), torch.tensor([[0.6, 0.4], [0.5, 0.5]]).log(), torch.zeros(2))
    assert q.right_among_labels(a).tolist() == [True, True]
    assert q.right_among_labels(a, prior).tolist() == [False, True]


def test_unseen_examples_are_reported_and_not_searched(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama-mha"].build(num_hidden_layers=2)
    every = [Example(e.prompt, e.labels, e.answer, ("", "zz")) for e in labelled(model, 400.0, 2)]
    search = Search(up=400.0, gammas=(0.1, 1.0, 400.0), seeds=(0, 1), top=0.25)
    steps: list[int] = []
    done = calibrate_zerotuning(
        model, Letters(), every[:24], search, unseen=every[24:], advance=lambda: steps.append(1)
    )
    assert len(steps) == most_settings(search, query_heads(model) or 0, 2, unseen=True)
    assert [o.objective for o in done.outcomes] == ["accuracy", "entropy"] and done.outcomes[0].heads
    rows = {row["name"]: row for row in done.unseen}
    assert list(rows)[:4] == ["dense", "all heads", "accuracy", "entropy"] and "random heads 0" in rows
    assert all(row["n"] == 16 for row in done.unseen) and rows["dense"]["accuracy_change"] == (0.0, 0.0, 0.0)
    assert (rows["accuracy"]["gamma"], rows["accuracy"]["heads"]) == (done.outcomes[0].gamma, done.outcomes[0].heads)
    gained = rows["accuracy"]["among_labels"] - rows["dense"]["among_labels"]
    assert math.isclose(rows["accuracy"]["among_labels_change"][0], gained, abs_tol=1e-6)
    assert {"content_free", "mean_corrected", "accuracy_over_corrected_dense", "change_by"} <= rows["entropy"].keys()
    unseen, blank = (
        Questions(Letters(), every[24:]),
        Questions(Letters(), [Example(b, every[0].labels) for b in ("", "zz")]),
    )
    prior = blank_prior(unseen, blank, blank.ask(model))
    want = unseen.right_among_labels(unseen.ask(model), prior).float().mean()
    assert math.isclose(rows["dense"]["content_free"], float(want), abs_tol=1e-6)
    lines = summary(done)
    assert len(lines) == 2 + len(done.unseen) and "prior-corrected" in lines[2]
    done.save(tmp_path)
    saved = json.loads((tmp_path / "calibration.json").read_text())
    assert [row["name"] for row in saved["unseen"]] == list(rows)
    bare = [Example(e.prompt, e.labels, e.answer) for e in every]
    without = calibrate_zerotuning(model, Letters(), bare[:24], search, unseen=bare[24:])
    assert "content_free" not in without.unseen[0] and without.unseen[0]["accuracy"] == rows["dense"]["accuracy"]


def test_unseen_examples_that_fit_nothing_are_refused() -> None:
    model = zoo.SUPPORTED["llama"].build()
    known = [Example(t, ("a", "b"), "a") for t in make_texts(8)]
    for unseen, sentence in (
        ([Example("p", ("a", "c"), "a")], "other labels"),
        ([Example("p")], "needs an 'answer'"),
    ):
        with pytest.raises(hfpatch.ConfigError, match=sentence):
            calibrate_zerotuning(model, Letters(), known, unseen=unseen)


def test_factors_to_try_from_a_text() -> None:
    assert factors("4,0.5, 2") == (0.5, 1.0, 2.0, 4.0)
    for text in ("two", "0", "nan", "1,,2"):
        with pytest.raises(hfpatch.ConfigError, match="--gammas"):
            factors(text)
