"""InfiniRetri against a plain NumPy reading of the method, fed with eager attention maps."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from tiny_tokenizer import VOCAB, byte_tokenizer

from hfpatch import ConfigError, HfpatchError, NothingPatchedError, get_patch, patch_model, patched
from hfpatch.api import Patch
from hfpatch.errors import InputError
from hfpatch.methods.infiniretri.method import InfiniRetri
from hfpatch.methods.infiniretri.prompt import make_prompt, tokenize
from hfpatch.methods.infiniretri.sentences import chunks, faithful_end, plain_end, sentences

TEXT = "".join(f"The {a} fox number {n} sleeps near the old mill. " for n, a in enumerate(["red", "blue", "odd"] * 14))
QUESTION = "Where does the blue fox sleep?"
SETTINGS: dict[str, Any] = {"chunk_tokens": 220, "top_tokens": 20, "phrase": 8, "keep_budget": 200}


def tiny(name: str = "llama", **extra: Any) -> Any:
    return zoo.SUPPORTED[name].build(vocab_size=VOCAB, **extra)


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


def changed(**values: Any) -> Any:
    """A change to a reading state: to its first sentence, its first item, or the whole."""

    def change(data: dict[str, Any]) -> Any:
        for at in (data["items"][0]["kept"][0], data["items"][0], data):
            at.update({k: v for k, v in values.items() if k in at})
        return data

    return change


DAMAGED: dict[str, Any] = {
    "a list": lambda data: [data], "no run": lambda data: {**data, "run": None}, "offset": changed(offset="0"),
    "offset below zero": changed(offset=-1), "no items": changed(items=[]), "item is text": changed(items=["x"]),
    "two items": lambda data: {**data, "items": data["items"] * 2}, "kept is text": changed(kept="x"),
    "kept lacks its text": changed(kept=[{"start": 0, "end": 2, "score": 0.5}]), "text is a number": changed(text=1),
    "ends before it starts": changed(start=9, end=3), "score is text": changed(score="high"),
    "path": changed(path=[[1]]), "weights": changed(weights=["x"]), "no number": changed(weights=[float("nan")]),
}  # fmt: skip
TORN = {
    "torn": lambda raw: raw[:-9],
    "twice": lambda raw: b'{"offset": 1, ' + raw[1:],
    "not UTF-8": lambda raw: b"\xff" + raw,
}


@pytest.mark.parametrize("name", [*DAMAGED, *TORN, "a folder"])
def test_a_damaged_reading_state_is_told_by_name(name: str, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    with patched(tiny(), "infiniretri", **SETTINGS) as patch:
        words = {"tokenizer": byte_tokenizer(), "progress": False, "state_file": str(state)}
        patch.retrieve(TEXT, QUESTION, **words)
        good = state.read_bytes()
        state.unlink()
        if name == "a folder":
            state.mkdir()
        else:
            raw = TORN[name](good) if name in TORN else json.dumps(DAMAGED[name](json.loads(good))).encode()
            state.write_bytes(raw)
        with pytest.raises(InputError, match="is not a reading state"):
            patch.retrieve(TEXT, QUESTION, **words)
        assert name == "a folder" or state.read_bytes() == raw


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


@pytest.mark.parametrize("end", [plain_end, faithful_end])
@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "no end at all " * 400,
        "line one\r\nline two\r\n\r\nnew paragraph\r\n" * 50,
        "狐は眠る。水車の近くで！本当？" * 60,
        "x" * 5000,
        "a,b;c|d\n" * 700,
        "Dr. A. met Mr. B. at 3.5 km. Then... 🦊 slept! \n\n\n End",
        ".",
    ],
)
def test_sentences_join_to_the_text(text: str, end: Any) -> None:
    tokenizer = byte_tokenizer()
    found = list(sentences(iter([text[:100], text[100:]]), 300, end))
    assert "".join(s.text for s in found) == text
    assert all(text[s.start : s.end] == s.text and len(s.text) <= 300 + 40 for s in found)
    packed = list(chunks(found, lambda t: tokenize(tokenizer, t), 128))
    assert "".join(e.sentence.text for c in packed for e in c) == text
    assert all(sum(len(e.ids) for e in c) <= 128 for c in packed)


def test_plain_sentences() -> None:
    found = [s.text for s in sentences(['Is it 3.5 km? Yes. He said "go." Then left.\n\nNew one.'], 300)]
    assert found == ["Is it 3.5 km? ", "Yes. ", 'He said "go." ', "Then left.\n\n", "New one."]


def test_a_megabyte_without_a_sentence_end() -> None:
    text = "ab" * (1 << 19)
    found = list(sentences([text], 4096))
    assert sum(len(s.text) for s in found) == len(text) and len(found) == len(text) // 4096


@pytest.mark.parametrize(
    "context,question,message",
    [
        ("", QUESTION, "context is empty"),
        (iter(()), QUESTION, "context is empty"),
        (TEXT, "", "Ask a question"),
        (TEXT, [], "Ask a question"),
        (TEXT, None, "Ask a question"),
        (TEXT, 3, "Ask a question"),
        ("A lone \ud800 half. ", QUESTION, "lone surrogates"),
        (b"bytes", QUESTION, "pass a string or an iterator"),
        (3, QUESTION, "pass a string or an iterator"),
        (iter([TEXT, 3]), QUESTION, "every piece has to be a string"),
        ([TEXT], [QUESTION, QUESTION], "do not pair up"),
        (TEXT, "why? " * 400, "ask a shorter one"),
    ],
)
def test_bad_input_is_named(context: Any, question: Any, message: str) -> None:
    with patched(tiny(), "infiniretri", **SETTINGS) as patch, pytest.raises(InputError, match=message):
        patch.retrieve(context, question, tokenizer=byte_tokenizer(), progress=False)


@pytest.mark.parametrize("what", ["retrieve", "answer", "generate", "rank_layers"])
def test_a_patch_that_does_not_read_says_so(what: str) -> None:
    with patched(tiny(), "streaming") as patch:
        given = {"retrieve": (TEXT, QUESTION), "generate": (TEXT, QUESTION), "answer": ([],)}.get(what, ())
        assert not patch.reads
        with pytest.raises(ConfigError, match=f"{what}: streaming does not read; patch the model with 'infiniretri'"):
            getattr(patch, what)(*given)
        assert not hasattr(patch, "retreive")
    with patched(tiny(), ["streaming", "infiniretri"]) as patch:
        assert patch.reads


def test_the_handle_takes_what_the_method_takes() -> None:
    for what in ("retrieve", "answer", "generate", "rank_layers"):
        own = inspect.signature(getattr(InfiniRetri, what)).parameters
        handle = inspect.signature(getattr(Patch, what)).parameters
        assert [n for n in own if n != "model"] == list(handle)
        assert all(own[n].default == p.default for n, p in handle.items())


def test_missing_tokenizer_chat_template_and_layers() -> None:
    with patched(tiny(), "infiniretri", **SETTINGS) as patch:
        with pytest.raises(InputError, match="tokenizer"):
            patch.retrieve(TEXT, QUESTION)
        for nothing in ("text", []):
            with pytest.raises(InputError, match="what retrieve"):
                patch.answer(nothing, tokenizer=byte_tokenizer())
    with patched(tiny(), "infiniretri", chat=True) as patch, pytest.raises(InputError, match="chat template"):
        patch.retrieve(TEXT, QUESTION, tokenizer=byte_tokenizer())
    with pytest.raises(NothingPatchedError, match="sliding"):
        patch_model(zoo.SUPPORTED["mistral"].build(), "infiniretri")
    with pytest.raises(ConfigError, match="template"):
        patch_model(tiny(), "infiniretri", template="{question}{context}")


def test_chat_template_is_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[bot]"
    prompt = make_prompt(tokenizer, "{context} Q: {question}", QUESTION, None)
    text = tokenizer.decode(prompt.ids(tokenize(tokenizer, "CTX")))
    assert re.fullmatch(r"\[user\]CTX Q: " + re.escape(QUESTION) + r"\[bot\]", text)


def test_the_patch_without_reading_changes_nothing() -> None:
    model = tiny()
    ids = zoo.prompt(model, 2, 63)
    want = model(ids).logits
    patch_model(model, "infiniretri")
    assert torch.equal(model(ids).logits, want)
    assert issubclass(InputError, HfpatchError)
    with pytest.raises(AttributeError):
        _ = get_patch(model).nonsense


def test_layers_are_ranked_by_what_they_find() -> None:
    with patched(zoo.SUPPORTED["gemma2"].build(vocab_size=VOCAB), "infiniretri", **SETTINGS) as patch:
        ranked = patch.rank_layers(tokenizer=byte_tokenizer(), probes=2)
        assert {n for n, _ in ranked} == {1, 3} and all(0 < score <= 1 for _, score in ranked)
        assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
        assert patch.layers == [3] and get_patch(patch._model) is patch
        for wrong in ({"tokenizer": None}, {"question": "Where?"}, {"probes": 0}):
            with pytest.raises(InputError):
                patch.rank_layers(**{"tokenizer": byte_tokenizer(), **wrong})


def test_the_embedded_model_retrieves_in_layer_2() -> None:
    from hfpatch.evals.testbed import load

    from hfpatch.text import grammar

    model, tokenizer = load()
    with patched(model, "infiniretri", template="{context}{question}", chunk_tokens=512) as patch:
        ranked = patch.rank_layers(tokenizer=tokenizer, question=grammar.question("{key}"), probes=4)
    assert ranked[0] == (2, 1.0) and ranked[1][1] < 0.9


def test_the_page_runs_as_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "infiniretri.md").read_text(encoding="utf-8")
    script = page.split("<!-- test -->\n```python\n", 1)[1].split("```", 1)[0]
    exec(compile(script, "infiniretri.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "The secret code for brisk-otter is 271828." in printed and "\n 271828" in printed


@pytest.mark.parametrize(
    "text",
    [
        "狐は眠る。水車の近くで！本当？🦊 Ünïcödé — naïve café. " * 12,
        "one,two;three\r\nfour,five;six\r\n\r\n" * 20,
        "x" * 900,
    ],
    ids=["unicode", "crlf", "no end"],
)
def test_any_text_is_read_to_its_end(text: str) -> None:
    with patched(tiny(), "infiniretri", **SETTINGS) as patch:
        found = patch.retrieve(text, QUESTION, tokenizer=byte_tokenizer(), progress=False)
    assert found.path[0]["start"] == 0 and found.path[-1]["end"] == len(text) and found.chunks > 1
    assert found.kept and all(text[k.start : k.end] == k.text for k in found.kept)
