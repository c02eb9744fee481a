"""InfiniRetri against a plain NumPy reading of the method, fed with eager attention maps."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from infiniretri_helpers import QUESTION, SETTINGS, TEXT, tiny
from tiny_tokenizer import VOCAB, byte_tokenizer

from hfpatch import HfpatchError, get_patch, patch_model, patched
from hfpatch.api import Patch
from hfpatch.errors import InputError
from hfpatch.methods.infiniretri.method import InfiniRetri, InfiniRetriConfig
from hfpatch.methods.infiniretri.prompt import make_prompt, tokenize
from hfpatch.methods.infiniretri.sentences import faithful_end, sentences


def same_convolution(row: np.ndarray, width: int) -> np.ndarray:
    """Sum over j - width//2 .. j + (width-1)//2 with zeros outside."""
    out = np.zeros_like(row)
    for j in range(len(row)):
        out[j] = row[max(0, j - width // 2) : j + (width - 1) // 2 + 1].sum()
    return out


def numpy_reading(name: str, layer: int, tokenizer: Any, settings: dict[str, Any]) -> list[list[str]]:
    """Sentences kept after every chunk, by the definition: faithful mode."""
    model = tiny(name, attn_implementation="eager")
    prompt = make_prompt(tokenizer, "{context}\n\nQuestion: {question}\nAnswer:", QUESTION, None)
    found = [s.text for s in sentences([TEXT], settings["chunk_tokens"] * 4, faithful_end)]
    packed: list[list[str]] = [[]]
    for s in found:
        if packed[-1] and len(tokenize(tokenizer, "".join([*packed[-1], s]))) > settings["chunk_tokens"]:
            packed.append([])
        packed[-1].append(s)
    kept: list[str] = []
    weights = None
    history = []
    for chunk in packed:
        context = [*kept, *chunk]
        spans = [tokenize(tokenizer, s) for s in context]
        ids = prompt.ids([t for s in spans for t in s])
        with torch.no_grad():
            maps = model(torch.tensor([ids]), output_attentions=True).attentions[layer]
        w = maps[0].sum(0).double().numpy()
        nq, start = len(prompt.tail), len(prompt.head)
        stop = start + sum(map(len, spans))
        q2c = w[-nq:, start:stop]
        if weights is None:
            weights = w[-nq:, -nq:].sum(1)
        phrased = np.stack([same_convolution(r, settings["phrase"]) for r in q2c])
        score = (weights[:, None] ** 2 * phrased).sum(0)
        top = set(np.argsort(score)[-settings["top_tokens"] :].tolist())
        owner = [n for n, s in enumerate(spans) for _ in s]
        kept = [s for n, s in enumerate(context) if any(owner[t] == n for t in top)]
        history.append(kept)
    return history


@pytest.mark.parametrize("name,layer", [("llama", 2), ("qwen2", 2), ("gemma2", 3)])
def test_faithful_mode_equals_the_numpy_reading(name: str, layer: int) -> None:
    tokenizer = byte_tokenizer()
    history = numpy_reading(name, layer, tokenizer, SETTINGS)
    assert len(history) > 5 and history[0] != history[-1]
    model = tiny(name, **({"attn_implementation": "eager"} if zoo.SUPPORTED[name].softcap else {}))
    with patched(model, "infiniretri", **SETTINGS, mode="faithful") as patch:
        assert patch.layers == [layer]
        found = patch.retrieve(TEXT, QUESTION, tokenizer=tokenizer, progress=False)
    assert [p["kept"] for p in found.path] == [len(k) for k in history]
    assert [k.text for k in found.kept] == history[-1]


def test_no_attention_maps_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    seen: list[dict[str, Any]] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(k) or forward(*a, **k))
    with patched(model, "infiniretri", **SETTINGS) as patch:
        patch.retrieve(TEXT, QUESTION, tokenizer=byte_tokenizer(), progress=False)
    assert len(seen) > 5
    assert all(not k.get("output_attentions") and k["logits_to_keep"] == 1 for k in seen)
    assert model.config._attn_implementation == "sdpa"


def test_kept_spans_are_the_text_and_stay_within_the_budget() -> None:
    with patched(tiny(), "infiniretri", **SETTINGS) as patch:
        found = patch.retrieve(TEXT, QUESTION, tokenizer=byte_tokenizer(), progress=False)
    assert found.kept and all(TEXT[k.start : k.end] == k.text for k in found.kept)
    assert [k.start for k in found.kept] == sorted(k.start for k in found.kept)
    assert all(p["kept_tokens"] <= SETTINGS["keep_budget"] for p in found.path)
    assert [p["start"] for p in found.path[1:]] == [p["end"] for p in found.path[:-1]]
    assert found.path[-1]["end"] == len(TEXT)


def test_several_questions_and_pairs_equal_one_by_one() -> None:
    tokenizer, other = byte_tokenizer(), "Which fox is odd?"
    with patched(tiny(), "infiniretri", **SETTINGS) as patch:
        alone = [patch.retrieve(TEXT, q, tokenizer=tokenizer, progress=False) for q in (QUESTION, other)]
        together = patch.retrieve(TEXT, [QUESTION, other], tokenizer=tokenizer, progress=False)
        pairs = patch.retrieve([TEXT, TEXT], [QUESTION, other], tokenizer=tokenizer, progress=False)
    for a, b, c in zip(alone, together, pairs, strict=True):
        assert [k.text for k in a.kept] == [k.text for k in b.kept] == [k.text for k in c.kept]


def test_an_iterator_gives_what_the_string_gives() -> None:
    tokenizer = byte_tokenizer()
    with patched(tiny(), "infiniretri", **SETTINGS) as patch:
        whole = patch.retrieve(TEXT, QUESTION, tokenizer=tokenizer, progress=False)
        pieces = patch.retrieve(
            (TEXT[n : n + 7] for n in range(0, len(TEXT), 7)), QUESTION, tokenizer=tokenizer, progress=False
        )
    assert whole.kept == pieces.kept


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    tokenizer, state = byte_tokenizer(), str(tmp_path / "state.json")

    def broken() -> Iterator[str]:
        yield TEXT[:900]
        raise KeyboardInterrupt

    with patched(tiny(), "infiniretri", **SETTINGS) as patch:
        whole = patch.retrieve(TEXT, QUESTION, tokenizer=tokenizer, progress=False)
        with pytest.raises(KeyboardInterrupt):
            patch.retrieve(broken(), QUESTION, tokenizer=tokenizer, progress=False, state_file=state)
        resumed = patch.retrieve(TEXT, QUESTION, tokenizer=tokenizer, progress=False, state_file=state)
        assert resumed.kept == whole.kept and resumed.path == whole.path
        with pytest.raises(InputError, match="other questions or settings"):
            patch.retrieve(TEXT, "Another?", tokenizer=tokenizer, progress=False, state_file=state)


def test_composes_with_a_patch_underneath() -> None:
    from hfpatch.config.registry import make_config

    model = tiny()
    methods = [
        make_config("streaming", {"sink": 2, "window": 32, "layers": "0-1"}),
        make_config("infiniretri", SETTINGS),
    ]
    with patched(model, methods) as patch:
        found = patch.retrieve(TEXT, QUESTION, tokenizer=byte_tokenizer(), progress=False)
        assert found.kept and patch.report().density("prefill") < 0.9


def test_layers_above_the_one_asked_do_not_run_while_reading() -> None:
    model, ran = tiny(), list[int]()
    for n, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, n=n: ran.append(n))
    with patched(model, "infiniretri", **SETTINGS, layers=[1]) as patch:
        found = patch.retrieve(TEXT, QUESTION, tokenizer=byte_tokenizer(), progress=False)
        assert ran == [0] * found.chunks
        model.hf_device_map = {"": "cpu"}
        again = patch.retrieve(TEXT, QUESTION, tokenizer=byte_tokenizer(), progress=False)
    assert set(ran) == set(range(len(model.model.layers))) and again.kept == found.kept


def test_generate_answers_from_what_was_kept() -> None:
    tokenizer, model = byte_tokenizer(), tiny()
    with patched(model, "infiniretri", **SETTINGS) as patch:
        found = patch.retrieve(TEXT, QUESTION, tokenizer=tokenizer, progress=False)
        kwargs = {"tokenizer": tokenizer, "progress": False, "max_new_tokens": 5, "do_sample": False}
        answer = patch.generate(TEXT, QUESTION, **kwargs)
        kwargs.pop("progress")
        assert patch.answer(found, **kwargs) == answer and patch.answer([found, found], **kwargs) == [answer] * 2
    prompt = make_prompt(tokenizer, "{context}\n\nQuestion: {question}\nAnswer:", QUESTION, None)
    ids = torch.tensor([prompt.ids(tokenize(tokenizer, found.text))])
    want = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert answer == tokenizer.decode(want, skip_special_tokens=True)


def test_the_handle_takes_what_the_method_takes() -> None:
    for what in ("retrieve", "answer", "generate", "rank_layers"):
        own = inspect.signature(getattr(InfiniRetri, what)).parameters
        handle = inspect.signature(getattr(Patch, what)).parameters
        assert [n for n in own if n != "model"] == list(handle)
        assert all(own[n].default == p.default for n, p in handle.items())


def test_the_patch_without_reading_changes_nothing() -> None:
    model = tiny()
    ids = zoo.prompt(model, 2, 63)
    want = model(ids).logits
    patch_model(model, "infiniretri")
    assert torch.equal(model(ids).logits, want)
    assert issubclass(InputError, HfpatchError)
    with pytest.raises(AttributeError):
        _ = get_patch(model).nonsense


@pytest.mark.parametrize("count,layer", [(1, 0), (2, 1), (3, 1), (4, 2), (24, 14), (30, 18)])
def test_the_layer_is_three_fifths_up_unless_layers_or_the_reference_say_otherwise(count: int, layer: int) -> None:
    every = [2 * n for n in range(count)]
    assert InfiniRetri(InfiniRetriConfig()).pick(every) == [2 * layer]
    assert InfiniRetri(InfiniRetriConfig(mode="faithful")).pick(every) == every[-1:]
    assert InfiniRetri(InfiniRetriConfig(layers="0-")).pick(every) == every[-1:]
    assert InfiniRetri(InfiniRetriConfig()).pick([]) == []


def test_the_answer_goes_on_from_its_prefix(tmp_path: Path) -> None:
    tokenizer, model, state = byte_tokenizer(), tiny(), str(tmp_path / "state.json")
    words = {"tokenizer": tokenizer, "progress": False, "state_file": state}
    with patched(model, "infiniretri", **SETTINGS) as patch:
        found = patch.retrieve(TEXT, QUESTION, **words, answer_prefix="The blue fox")
        assert found.answer_prefix == "The blue fox"
        answer = patch.answer(found, tokenizer=tokenizer, max_new_tokens=5, do_sample=False)
        assert patch.generate(TEXT, QUESTION, **words, answer_prefix="The blue fox", max_new_tokens=5) == answer
        with pytest.raises(InputError, match="other questions or settings"):
            patch.retrieve(TEXT, QUESTION, **words)
        with pytest.raises(InputError, match="answer_prefix is the text"):
            patch.retrieve(TEXT, QUESTION, tokenizer=tokenizer, answer_prefix=["The"])
    text = f"{found.text}\n\nQuestion: {QUESTION}\nAnswer: The blue fox"
    ids = torch.tensor([[tokenizer.bos_token_id] * bool(tokenizer("a")["input_ids"][1:]) + tokenize(tokenizer, text)])
    want = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert answer == tokenizer.decode(want, skip_special_tokens=True)


def test_layers_are_ranked_by_what_they_find() -> None:
    with patched(zoo.SUPPORTED["gemma2"].build(vocab_size=VOCAB), "infiniretri", **SETTINGS) as patch:
        ranked = patch.rank_layers(tokenizer=byte_tokenizer(), probes=2)
        assert {n for n, _ in ranked} == {1, 3} and all(0 < score <= 1 for _, score in ranked)
        assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
        assert patch.layers == [3] and get_patch(patch._model) is patch
        for wrong in ({"tokenizer": None}, {"question": "Where?"}, {"probes": 0}):
            with pytest.raises(InputError):
                patch.rank_layers(**{"tokenizer": byte_tokenizer(), **wrong})


def test_the_embedded_model_retrieves_in_layer_2_and_that_is_the_default() -> None:
    from hfpatch.evals.testbed import load

    from hfpatch.text import grammar

    model, tokenizer = load()
    with patched(model, "infiniretri", template="{context}{question}", chunk_tokens=512) as patch:
        ranked = patch.rank_layers(tokenizer=tokenizer, question=grammar.question("{key}"), probes=4)
        assert patch.layers == [2]
    assert ranked[0] == (2, 1.0) and ranked[1][1] < 0.9


def test_the_page_runs_as_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "infiniretri.md").read_text(encoding="utf-8")
    script = page.split("<!-- test -->\n```python\n", 1)[1].split("```", 1)[0]
    exec(compile(script, "infiniretri.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "The secret code for brisk-otter is 271828." in printed and "\n 271828" in printed
