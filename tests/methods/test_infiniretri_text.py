"""Text as InfiniRetri reads it: sentences, chunks, the chat template, any text to its end."""

import re
from typing import Any

import pytest
from infiniretri_helpers import QUESTION, SETTINGS, TEXT, tiny
from tiny_tokenizer import byte_tokenizer

from hfpatch import patched
from hfpatch.methods.infiniretri.prompt import make_prompt, tokenize
from hfpatch.methods.infiniretri.sentences import chunks, faithful_end, plain_end, sentences


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


def test_chat_template_is_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[bot]"
    prompt = make_prompt(tokenizer, "{context} Q: {question}", QUESTION, None)
    text = tokenizer.decode(prompt.ids(tokenize(tokenizer, "CTX")))
    assert re.fullmatch(r"\[user\]CTX Q: " + re.escape(QUESTION) + r"\[bot\]", text)


@pytest.mark.parametrize(
    "chat,begins,written",
    [
        (None, "It sleeps", "[user]CTX Q: {}[bot]It sleeps"),
        (None, "", "[user]CTX Q: {}[bot]"),
        (False, "It sleeps", "CTX Q: {} It sleeps"),
        (False, "", "CTX Q: {}"),
    ],
)
def test_the_answers_beginning_stands_in_the_assistants_turn(chat: bool | None, begins: str, written: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[bot]"
    prompt = make_prompt(tokenizer, "{context} Q: {question}", QUESTION, chat, begins)
    assert tokenizer.decode(prompt.ids(tokenize(tokenizer, "CTX"))) == written.format(QUESTION)
    assert tokenizer.decode(prompt.tail).endswith(begins) and tokenizer.decode(prompt.tail).startswith(QUESTION)


def test_an_answer_does_not_begin_among_thoughts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}[bot]<think>"
    for begins, end in (("It", "[bot]<think>\n</think>\n\nIt"), ("", "[bot]<think>")):
        prompt = make_prompt(tokenizer, "{context} {question}", QUESTION, None, begins)
        assert tokenizer.decode(prompt.tail) == QUESTION + end


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
