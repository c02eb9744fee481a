"""The survey can be trusted: tiny models are small and mixed, masks are right by hand, and wrong patches are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from survey import judge as judging
from survey import page
from survey.build import CAUSAL, FIRST_PLAIN_ID, VISION, build
from survey.judge import judge
from survey.oracle import Oracle, interface
from survey.patterns import METHODS, Method, quest, streaming
from survey.record import Recorder
from survey.scenario import prefill, relative
from survey.sizes import LAYERS, VOCAB, WINDOW, small
from survey.verdict import NOT_BUILT, REFUSED, RIGHT, WRONG, Verdict

import hfpatch

TYPES = {"llama": [], "gemma2": ["sliding", "softcap"], "qwen3_next": ["linear"]}
INSTALLED = ".".join(transformers.__version__.split(".")[:2])


@pytest.mark.parametrize("name", TYPES)
def test_models_are_small_mixed_and_always_the_same(name: str) -> None:
    model = build(name)
    config = model.config.get_text_config()
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert (config.num_hidden_layers, config.vocab_size) == (LAYERS, VOCAB)
    assert len(set(getattr(config, "layer_types", None) or [0])) == (1 if name == "llama" else 2)
    one, two = model.state_dict(), build(name).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    ids = prefill().ids
    assert ids.min() >= FIRST_PLAIN_ID and ids.max() < VOCAB


def test_sizes_go_by_name() -> None:
    assert [small(n, 4096) for n in ("hidden_size", "sliding_window", "num_key_value_heads")] == [64, WINDOW, 2]
    assert (small("moe_intermediate_size", 8), small("patch_size", 14), small("head_dim", 0)) == (8, 14, 0)


def test_streaming_by_hand() -> None:
    q = k = torch.zeros(2, 1, 14, 1)
    at = torch.arange(14)
    kept = streaming(q, k, at, at, torch.tensor([0, 3]))[:, 0]
    assert kept[0, 13].nonzero().flatten().tolist() == [0, 1, *range(6, 14)]
    assert kept[1, 13].nonzero().flatten().tolist() == [3, 4, *range(6, 14)]


def test_quest_by_hand() -> None:
    k = torch.zeros(1, 1, 30, 1)
    k[0, 0, 9], k[0, 0, 14], k[0, 0, 21] = 5.0, 4.0, -9.0
    at = torch.arange(30)
    start = torch.zeros(1, dtype=torch.long)
    kept = quest(torch.ones(1, 2, 1, 1), k, at[-1:], at, start)
    pages = {n // 4 for n in kept[0, 0, 0].nonzero().flatten().tolist()}
    assert kept.shape == (1, 2, 1, 30) and {2, 3, 7} < pages and len(pages) == 4
    opposite = quest(-torch.ones(1, 2, 1, 1), k, at[-1:], at, start)
    assert opposite[0, 0, 0, 20:24].all()


def test_the_oracle_is_the_model_when_it_keeps_everything_and_not_otherwise() -> None:
    model = build("gemma2")
    scenario, seen = prefill(), Recorder()
    with interface(seen.wrap):
        full = scenario.run(model, seen)
    assert len(seen.calls) == LAYERS and len(seen.plain) == LAYERS // 2
    everything = Method({}, lambda q, k, i, j, starts: torch.ones(1, 1, len(i), len(j), dtype=torch.bool))
    for method, close in ((everything, True), (METHODS["streaming"], False)):
        oracle = Oracle(seen.plain, method)
        with interface(oracle.wrap):
            assert (relative(scenario.run(model, oracle), full) < 1e-5) == close
        assert (oracle.kept == oracle.visible) == close
    assert oracle.visible == LAYERS // 2 * 2 * 4 * 63 * 64 // 2


@pytest.mark.parametrize("name", TYPES)
def test_right_types_are_right(name: str) -> None:
    verdict = judge(name)
    assert (verdict.verdict, verdict.reason, verdict.kinds) == (RIGHT, "", TYPES[name])
    assert verdict.patched == (4 if name == "llama" else 2)
    compared = {"prefill", "decode", "decode, one pass", "left padding, rows alone", "quest, decode"}
    assert compared <= verdict.errors.keys()


@pytest.fixture
def streaming_class() -> Any:
    return hfpatch.get_method("streaming")


def faults(monkeypatch: pytest.MonkeyPatch, *methods: str) -> str:
    """What the survey finds wrong with a llama; with some of the methods only, to be quick."""
    monkeypatch.setattr(judging, "METHODS", {n: m for n, m in METHODS.items() if n == "streaming" or n in methods})
    verdict = judge("llama")
    assert verdict.verdict == WRONG
    return verdict.reason


@pytest.mark.parametrize("setting", [{"window": 9}, {"sink": 3}])
def test_another_pattern_is_found(setting: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = METHODS["streaming"]
    monkeypatch.setitem(METHODS, "streaming", replace(plain, settings={**plain.settings, **setting}))
    reason = faults(monkeypatch)
    assert "prefill: off by" in reason and "decode: off by" in reason and "the report says density" in reason
    assert "one pass" not in reason and "rows alone" not in reason


def test_a_patch_that_never_acts_is_found(monkeypatch: pytest.MonkeyPatch, streaming_class: Any) -> None:
    monkeypatch.setattr(streaming_class, "select", lambda self, call: None)
    assert "decode: the report says density 1.00" in faults(monkeypatch)


def test_calls_left_dense_without_a_word_are_found(monkeypatch: pytest.MonkeyPatch, streaming_class: Any) -> None:
    original = streaming_class.select

    def select(self: Any, call: Any) -> Any:
        return original(self, call) if call.Lk > 40 or call.Lq == 1 else None

    monkeypatch.setattr(streaming_class, "select", select)
    assert {part.split(":")[0] for part in faults(monkeypatch).split("; ")} == {
        "turns", "turns, one pass", "left padding", "left padding, rows alone",
    }  # fmt: skip


def test_state_of_another_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    quest_class: Any = hfpatch.get_method("quest")
    original, shared = quest_class.select, {}

    def select(self: Any, call: Any) -> Any:
        call.states = shared.setdefault(call.Lk // 64, {})
        return original(self, call)

    monkeypatch.setattr(quest_class, "select", select)
    reason = faults(monkeypatch, "quest")
    assert "quest, decode: off by" in reason and not reason.startswith("decode")


def test_traces_of_a_patch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = hfpatch.unpatch_model

    def leave_a_trace(model: Any) -> Any:
        model.trace = 1
        return original(model)

    monkeypatch.setattr(hfpatch, "unpatch_model", leave_a_trace)
    assert faults(monkeypatch) == "after unpatching the model is not what it was"


def test_errors_that_say_nothing_to_the_user_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("heads")

    monkeypatch.setattr(hfpatch, "patch_model", fail)
    assert faults(monkeypatch) == "KeyError: 'heads'"


def test_types_refused_for_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, *args: Any, **kwargs: Any) -> Any:
        raise hfpatch.UnsupportedModelError("it has no attention; use another")

    monkeypatch.setattr(hfpatch, "patch_model", refuse)
    assert faults(monkeypatch) == "refused (it has no attention), but 4 layers are plain causal attention"


@pytest.mark.parametrize(
    "off,own,faults,notes",
    [
        (1e-5, 0.0, [], []),
        (1e-4, 0.0, ["x: off by 1.0e-04"], []),
        (1e-4, 5e-5, [], []),
        (1e-2, 0.5, [], ["x: not judged, explicit masks alone are off by 5e-01"]),
        (float("nan"), 0.0, ["x: off by nan"], []),
    ],
)
def test_rounding_is_measured_on_the_unpatched_model(
    off: float, own: float, faults: list[str], notes: list[str]
) -> None:
    judge = judging.Judge(torch.nn.Linear(1, 1), Verdict("llama"))
    judge.scenarios["x"] = (prefill(), own)
    judge._equal("x", torch.tensor([1.0, 2.0 + 2 * off]), torch.tensor([1.0, 2.0]), "x")
    assert (judge.faults, judge.verdict.notes) == (faults, notes)


@pytest.mark.parametrize("name", ["mistral", "mamba"])
def test_types_without_such_layers_are_refused(name: str) -> None:
    verdict = judge(name)
    assert verdict.verdict == REFUSED and verdict.reason and not verdict.patched


@pytest.fixture
def written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Verdict]]:
    verdicts = [
        Verdict("llama", RIGHT, "", 4, 4, ["sliding"], ["unpatched: no turns"]),
        Verdict("gpt2", WRONG, "a | b;\nc", 3, 4),
        Verdict("mamba", REFUSED, "no attention"),
        Verdict("llava", NOT_BUILT, "no pictures"),
    ]
    monkeypatch.setattr(page, "PATH", tmp_path / "models.md")
    page.PATH.write_text(page.render(verdicts))
    yield verdicts


def test_the_page_can_be_read_back(written: list[Verdict]) -> None:
    assert page.release() == INSTALLED
    assert page.known() == {v.name: page.cells(v) for v in written}
    assert page.known()["gpt2"] == (WRONG, "3 of 4", "a / b; c")
    text = page.PATH.read_text()
    assert "| wrong | 1 |" in text and "Wrong: `gpt2`." in text
    assert "1 right, 1 refused, 1 wrong." in text and "sliding; unpatched: no turns" in text


def test_the_checked_in_page_lists_the_types_of_its_release() -> None:
    if page.release() != INSTALLED:
        pytest.skip(f"the page is of Transformers {page.release()}")
    assert page.known().keys() == {*CAUSAL, *VISION}
