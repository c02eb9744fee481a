"""JSON people edit and lines of it: files of examples with any text in them, damaged ones refused with their line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import tiny_tokenizer

from hfpatch.calibrate.classification import Source, make_examples
from hfpatch.calibrate.classification import read_examples as read_questions
from hfpatch.calibrate.flux.examples import read_examples
from hfpatch.errors import ConfigError
from hfpatch.files.json_text import json_lines, load_json

SEPARATORS = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def raw(text: str) -> str:
    """JSON of a text with its separators as they are, where JSON allows that."""
    return json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize("mark", SEPARATORS, ids=ascii)
def test_lines_end_at_line_feeds_alone(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    line = f'{{"prompt": {raw(f"a{mark}b")}, "answer": {raw(f" c{mark}")}, "kind": "retrieval"}}\n'
    file.write_bytes(("\ufeff" + line + "\r\n \n" + line).encode())
    assert [n for n, _ in json_lines(file)] == [1, 4]
    assert [e.prompt for e in read_questions(file)] == [f"a{mark}b"] * 2
    assert Source(str(file)).load(1)[0].answer == f" c{mark}"
    assert len(list(read_examples(file, tiny_tokenizer(), 64))) == 2


GOOD = '{"prompt": "a", "answer": " b", "kind": "retrieval"}\n'
BAD = {
    "garbage": "garbage\n",
    "cut": '{"prompt": "a", "ans\n',
    "deep": "[" * 100_000 + "\n",
    "long number": '{"prompt": ' + "9" * 5000 + "}\n",
    "key twice": '{"prompt": "a", "prompt": "b"}\n',
    "number": "5\n",
    "list": "[]\n",
    "no prompt": '{"answer": " b", "kind": "retrieval"}\n',
    "number for a prompt": '{"prompt": 5, "answer": " b", "kind": "retrieval"}\n',
    "list for an answer": '{"prompt": "a", "answer": [" b"], "kind": "retrieval"}\n',
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_one_sentence_with_their_number(name: str, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text(GOOD + BAD[name])
    for read in (read_questions, lambda path: list(read_examples(path, tiny_tokenizer(), 64))):
        with pytest.raises(ConfigError) as raised:
            read(file)
        told = str(raised.value)
        assert told.startswith(str(file)) and ("line 2" in told or ":2:" in told) and "\n" not in told
        assert len(told) < 400


def test_bytes_and_missing_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode() + b"\xff\n")
    with pytest.raises(ConfigError, match=r"x\.jsonl:2: .*utf-8"):
        read_questions(tmp_path / "x.jsonl")
    for path in (tmp_path, tmp_path / "no.jsonl", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(ConfigError, match="cannot be read"):
            list(json_lines(path))
    (tmp_path / "x.jsonl").write_bytes(b"\n")
    with pytest.raises(ConfigError, match="holds no examples"):
        read_questions(tmp_path / "x.jsonl")


@pytest.mark.parametrize("row", [{"prompt": "a", "labels": 5}, {"prompt": "a", "labels": [5]}, {"prompt": ""}, 5])
def test_rows_that_are_no_examples_are_refused(row: Any) -> None:
    with pytest.raises(ConfigError, match="here"):
        make_examples([row], "here")


def test_an_answer_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(GOOD.replace(" b", ""))
    with pytest.raises(ConfigError, match="line 1: the answer has no token"):
        list(read_examples(tmp_path / "x.jsonl", tiny_tokenizer(), 64))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"), ("[" * 80 + "]" * 80, "nested too deeply"), ("9" * 5000, "5000 digits"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is set twice"), ("", "Expecting value"), ("\ufeff1", "BOM"),
    ],
)  # fmt: skip
def test_json_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_json(text)


def test_json_that_is_read() -> None:
    assert load_json('{"a": [1, 2.5, "\u2028", null, true, {}]}') == {"a": [1, 2.5, "\u2028", None, True, {}]}
    assert load_json("9" * 99) == int("9" * 99)
