"""Searching zerotuning's heads and factor, and training gates, on tiny models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_invariants import logits
from torch import Tensor, nn
from zoo_model import BOS

import hfpatch
from hfpatch import PatchConfig, get_patch, patched
from hfpatch.calibrate.act import calibrate_act
from hfpatch.calibrate.act import summary as summary_of_act
from hfpatch.calibrate.classification import (
    RENAMED,
    Answers,
    Example,
    Questions,
    embedded_examples,
    hub_examples,
    make_examples,
    measures,
    read_examples,
)
from hfpatch.calibrate.gated import GateRecipe, calibrate_gated, divergence, running_texts
from hfpatch.calibrate.intervals import paired, wilson
from hfpatch.calibrate.zerotuning import Search, calibrate_zerotuning, most_settings, summary
from hfpatch.methods.act import ACTConfig
from hfpatch.methods.zerotuning import ZeroTuningConfig
from hfpatch.runtime.model_facts import query_heads


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None, **_: Any) -> Any:
        ids = [8 + ord(c) % 90 for c in text]
        ids = [BOS, *ids] if add_special_tokens else ids
        if return_tensors:
            return type("Encoding", (), {"input_ids": torch.tensor([ids])})
        return {"input_ids": ids}


def make_texts(count: int, length: int = 24) -> list[str]:
    g = torch.Generator().manual_seed(0)
    return ["".join(chr(97 + int(n)) for n in torch.randint(26, (length + k % 3,), generator=g)) for k in range(count)]


def labelled(model: nn.Module, gamma: float, head: int) -> list[Example]:
    """Examples whose answer is what the model says when one head has this factor."""
    plain = [Example(t, ("a", "b", "c", "d")) for t in make_texts(40)]
    questions = Questions(Letters(), plain)
    with patched(model, ZeroTuningConfig(gamma=gamma, heads=[head])):
        names = [questions.names[n] for n in questions.ask(model).labels.argmax(-1)]
    return [Example(e.prompt, e.labels, n) for e, n in zip(plain, names, strict=True)]


def crafted() -> tuple[Questions, Answers]:
    """Four examples with known outcomes: right, wrong, invalid, and a label the example does not allow."""
    examples = [
        Example("w", ("a", "b"), "a"), Example("x", ("a", "b"), "a"),
        Example("y", ("a", "b"), "b"), Example("z", ("a", "b"), "b"),
    ]  # fmt: skip
    q = Questions(Letters(), [*examples, Example("v", ("c",), "c")])
    a, b, c = q.first.tolist()
    log = torch.tensor([[0.6, 0.1, 0.1], [0.3, 0.5, 0.1], [0.3, 0.2, 0.1], [0.3, 0.1, 0.5], [0.1, 0.1, 0.1]]).log()
    return q, Answers(torch.tensor([a, b, 5, c, c]), log, torch.arange(5.0))


def test_measures_by_hand() -> None:
    q, a = crafted()
    found = measures(q, a, torch.arange(4))
    assert found["accuracy"] == 0.25 and found["invalid"] == 0.5 and found["accuracy_of_valid"] == 0.5
    assert found["accuracy_among_labels"] == 0.25 and found["entropy"] == 1.5
    assert math.isclose(found["log_likelihood"], sum(map(math.log, (0.6, 0.3, 0.2, 0.1))) / 4, rel_tol=1e-5)
    prior = q.prior(a, torch.arange(4))
    assert torch.allclose(prior[0], a.labels[:4, 0].mean()) and prior[2] == 0
    assert q.right_among_labels(a, prior)[:4].tolist() == [True, False, True, False]


def test_intervals_by_hand() -> None:
    low, high = wilson(torch.arange(10) < 8)
    assert abs(low - 0.4902) < 1e-4 and abs(high - 0.9433) < 1e-4
    assert wilson(torch.zeros(50))[0] == 0
    mean, low, high = paired(torch.ones(40), torch.zeros(40))
    assert (mean, low, high) == (1.0, 1.0, 1.0)
    mean, low, high = paired((torch.arange(100) < 60).float(), (torch.arange(100) < 50).float())
    assert abs(mean - 0.1) < 1e-6 and 0.02 < low < 0.06 and 0.14 < high < 0.18


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.SUPPORTED["llama-mha"].build(num_hidden_layers=2)


def test_search_finds_the_head_that_was_tuned(model: Any, tmp_path: Path) -> None:
    examples = labelled(model, 400.0, 2)
    search = Search(up=400.0, gammas=(0.1, 1.0, 20.0, 400.0), seeds=(0, 1), top=0.25)
    steps: list[int] = []
    done = calibrate_zerotuning(model, Letters(), examples, search, advance=lambda: steps.append(1))
    best = done.chosen("accuracy")
    assert best.heads == [2] and best.gamma == 400.0 and best.direction == "up"
    assert best.held_out["n"] == 20 and best.held_out["after"]["accuracy_among_labels"] == 1.0
    assert best.held_out["before"]["accuracy_among_labels"] < 1.0
    assert best.grid[0]["gamma"] == 1.0 and len(done.sweep) <= len(steps)
    assert len(steps) == most_settings(search, query_heads(model), len(done.outcomes))
    assert {o.seed for o in done.outcomes} == {0, 1} and len(done.outcomes) == 4
    assert all("random_heads" in o.held_out for o in done.outcomes if o.heads)
    assert len(summary(done)) == 4 and "prior-corrected" in summary(done)[0]

    done.save(tmp_path)
    saved = json.loads((tmp_path / "calibration.json").read_text())
    assert len(saved["sweep"]) == len(done.sweep) and saved["versions"]["hfpatch"] == hfpatch.__version__
    ids = zoo.prompt(model, 1, 30)
    with patched(model, PatchConfig.from_pretrained(tmp_path / "accuracy")):
        got = logits(model, ids)
    with patched(model, "zerotuning", gamma=400.0, heads=[2]):
        assert torch.equal(got, logits(model, ids))


def test_entropy_needs_no_answers(model: Any) -> None:
    done = calibrate_zerotuning(model, Letters(), [Example(t) for t in make_texts(16)], Search(seeds=(0,)))
    (only,) = done.outcomes
    assert only.objective == "entropy" and "accuracy" not in done.sweep[0]
    tried = {g["gamma"]: g["entropy"] for g in only.grid}
    assert only.gamma == min(tried, key=lambda g: tried[g]) and only.heads
    change = only.held_out["after"]["entropy"] - only.held_out["before"]["entropy"]
    assert math.isclose(only.held_out["entropy_change"][0], change, abs_tol=1e-5)
    assert tried[only.gamma] < tried[1.0]


def test_nothing_helps_gives_gamma_one(model: Any) -> None:
    same = Search(up=1.0, down=1.0, seeds=(0,))
    done = calibrate_zerotuning(model, Letters(), labelled(model, 2.0, 0), same)
    assert done.chosen("accuracy").gamma == 1.0 and done.config("accuracy").methods[0].gamma == 1.0
    assert "no head helps" in summary(done)[0]


def test_examples_from_files_and_templates(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "p", "answer": " x"}\n\n{"prompt": "q", "answer": " y"}\n')
    assert read_examples(file) == [Example("p", (" x", " y"), " x"), Example("q", (" x", " y"), " y")]
    file.write_text('{"question": "p"}')
    with pytest.raises(hfpatch.ConfigError, match="needs a 'prompt'"):
        read_examples(file)
    with pytest.raises(hfpatch.ConfigError, match="JSON lines"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(hfpatch.ConfigError, match="same token"):
        Questions(Letters(), make_examples([{"prompt": "p", "answer": "ab"}, {"prompt": "p", "answer": "ac"}], "x"))
    with pytest.raises(hfpatch.ConfigError, match="too few"):
        calibrate_zerotuning(zoo.SUPPORTED["llama"].build(), Letters(), [Example("p")])
    drawn = embedded_examples(5)
    assert len({e.prompt for e in drawn}) == 5 and drawn == embedded_examples(5)
    assert all(e.answer in e.labels and len(e.labels) == 3 and e.prompt.endswith("Topic:") for e in drawn)
    other = embedded_examples(5, renamed=True)
    assert [RENAMED[e.answer[1:]] for e in drawn if e.answer] == [e.answer[1:] for e in other if e.answer]
    assert not any(f"Topic: {t}" in e.prompt for e in other for t in RENAMED)
    assert len(embedded_examples(1, shots=0)[0].labels) == 4


def test_examples_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": f"t{n}", "label": n % 2} for n in range(20)])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    drawn = hub_examples("owner/name", "train", 9, "Say {text}:", "label", [" no", " yes"])
    assert len(drawn) == 9 and {e.answer for e in drawn} == {" no", " yes"}
    assert all(e.answer == (" no", " yes")[int(e.prompt[5:-1]) % 2] for e in drawn)
    assert hub_examples("owner/name", "train", 99, "{text}", "text")[0].labels[0] == " t0"


def test_gates_are_trained_saved_and_measured(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama-mha"].build(num_hidden_layers=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    texts = make_texts(12, 40)
    results = {}
    for sparsity, rate in ((0.0, 1e-6), (1.0, 0.02)):
        recipe = GateRecipe(steps=15, rate=rate, sparsity=sparsity)
        results[sparsity] = calibrate_gated(model, Letters(), texts, tmp_path / f"s{sparsity}", recipe)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "_hfpatch_patch")
    kept, sparse = results[0.0], results[1.0]
    assert abs(kept.kl[0]) < 1e-6 and abs(kept.mean_gate - 1.0) < 1e-4
    assert abs(kept.sink_mass_gated - kept.sink_mass_before) < 1e-4
    assert sparse.kl[0] > 0.0 and sparse.mean_gate < 0.9 and sparse.sink_mass_gated < kept.sink_mass_gated
    assert json.loads((tmp_path / "s1.0" / "calibration.json").read_text())["mean_gate"] == sparse.mean_gate

    saved = PatchConfig.from_pretrained(tmp_path / "s1.0")
    assert {t.shape for t in saved.tensors.values()} == {torch.Size([4, 64])} and len(saved.tensors) == 2
    ids = Letters()(texts[0], return_tensors="pt").input_ids
    want = logits(model, ids)
    hfpatch.patch_model(model, saved)
    assert not any("gates are new" in n for n in get_patch(model).report().notes)
    got = divergence(want, logits(model, ids)).mean()
    assert 0.1 * sparse.kl[0] < float(got) < 10 * sparse.kl[0]


def test_texts_to_train_on() -> None:
    drawn = running_texts("prose", 3, 200, Letters())
    assert len(set(drawn)) == 3 and all(200 <= len(t) + 1 < 2000 for t in drawn)
    assert drawn == running_texts("prose", 3, 200, Letters())


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    want = float((p * (p / q).log()).sum())
    got: Tensor = divergence(p.log() + 3, q.log() - 1)
    assert abs(float(got) - want) < 1e-6


def test_act_keeps_the_heads_that_help_alone(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    config = ACTConfig(beta=0.0, threshold=0.01)
    plain = [Example(t, ("a", "b", "c", "d")) for t in make_texts(40)]
    questions = Questions(Letters(), plain)
    with patched(model, ACTConfig(beta=0.0, threshold=0.01, heads=[[1, 2]])):
        names = [questions.names[n] for n in questions.ask(model).labels.argmax(-1)]
    examples = [Example(e.prompt, e.labels, n) for e, n in zip(plain, names, strict=True)]
    steps: list[int] = []
    found = calibrate_act(model, Letters(), examples, config, rule="likelihood", advance=lambda: steps.append(1))
    heads = [(h["layer"], h["head"]) for h in found.heads]
    gains = {h: t["log_likelihood"] - found.base["log_likelihood"] for h, t in zip(heads, found.heads, strict=True)}
    assert max(gains, key=lambda h: gains[h]) == (1, 2) and [1, 2] in found.kept
    assert found.kept == [list(h) for h in heads if gains[h] > 0] and len(found.kept) < len(heads)
    assert len(steps) == len(heads) + 4 and found.held_out["n"] == 20 and len(summary_of_act(found)) == 3
    found.save(tmp_path)
    saved = json.loads((tmp_path / "calibration.json").read_text())
    assert saved["kept"] == found.kept and len(saved["heads"]) == len(heads)
    ids = zoo.prompt(model, 1, 40)
    with patched(model, PatchConfig.from_pretrained(tmp_path)):
        loaded = logits(model, ids)
    with patched(model, ACTConfig(beta=0.0, threshold=0.01, heads=found.kept)):
        assert torch.equal(loaded, logits(model, ids))


def test_act_calibration_refuses_what_it_cannot_use() -> None:
    model = zoo.SUPPORTED["llama"].build()
    some = [Example(t, ("a", "b"), "a") for t in make_texts(8)]
    for examples, words, sentence in (
        (some, {"rule": "speed"}, "not one of"),
        (some, {"config": ACTConfig(heads=[[0, 1]])}, "leave it out"),
        (some[:4], {}, "too few"),
        ([Example(e.prompt) for e in some], {}, "needs an 'answer'"),
    ):
        with pytest.raises(hfpatch.ConfigError, match=sentence):
            calibrate_act(model, Letters(), examples, **words)


def test_act_calibration_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfpatch import cli

    words = ["calibrate", "act", "embedded", "--examples", "8", "--layers", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["hfpatch", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0 and isinstance(PatchConfig.from_pretrained(tmp_path).methods[0], ACTConfig)
