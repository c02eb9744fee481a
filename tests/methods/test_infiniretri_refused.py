"""What InfiniRetri does not take: bad input, damaged states, patches that do not read."""

import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from infiniretri_helpers import QUESTION, SETTINGS, TEXT, tiny
from tiny_tokenizer import byte_tokenizer

from hfpatch import ConfigError, NothingPatchedError, patch_model, patched
from hfpatch.errors import InputError


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
