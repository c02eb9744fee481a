"""YAML that is no plain data, is damaged or never ends: one sentence with file and line."""

import time

import pytest
from hfpatch.evals.errors import FileError

from hfpatch.files.located import MOST_BYTES, parse, read
from hfpatch.files.plain_yaml import MOST_VALUES

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{here}: &{here} [{','.join(['*' + before] * 9)}]\n" for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "int tag": ('a: 1\nb: !!int "x"\n', 2, "'x' is not a whole number"),
    "empty int": ('a: 1\nb: !!int ""\n', 2, "'' is not a whole number"),
    "hexadecimal without digits": ("a: 1\nb: 0x_\n", 2, "'0x_' is not a whole number"),
    "bool tag": ('b: !!bool "x"\n', 1, "'x' is not true or false"),
    "float tag": ('b: !!float ""\n', 1, "'' is not a number"),
    "timestamp": ('a:\n  - !!timestamp "x"\n', 2, "the tag 'tag:yaml.org,2002:timestamp'"),
    "binary": ('b: !!binary "eA=="\n', 1, "the tag 'tag:yaml.org,2002:binary'"),
    "set": ("b: !!set {x}\n", 1, "the tag 'tag:yaml.org,2002:set'"),
    "omap": ("b: !!omap [x: 1]\n", 1, "the tag 'tag:yaml.org,2002:omap'"),
    "python": ("a: 1\nb: !!python/object/apply:os.getcwd []\n", 2, "not valid YAML here"),
    "tag of their own": ("b: !mine 1\n", 1, "the tag '!mine'"),
    "long number": ("a: 1\n\nb: " + "9" * 5000, 3, "too long for a whole number"),
    "long hexadecimal": ("b: 0x" + "f" * 5000, 1, "too long for a whole number"),
    "long base 60": ("b: " + "1:" * 5000 + "1", 1, "too long for a whole number"),
    "long fraction": ("b: ." + "9" * 5000, 1, "too long for a number"),
    "control character": ("a: 1\n# \x07\n", 2, "the character U+0007"),
    "NUL": ("a: 1\nb: \0\n", 2, "the character U+0000"),
    "escaped NUL": ('a: 1\nb: "x\\0"\n', 2, "the character U+0000"),
    "escaped surrogate": ('b: "\\ud800"\n', 1, "the character U+D800"),
    "surrogate in a key": ('"\\ud800": 1\n', 1, "the character U+D800"),
    "escape out of range": ('a: 1\nb: "\\UFFFFFFFF"\n', 2, "not valid YAML or JSON"),
    "version out of range": ("%YAML " + "9" * 5000 + ".1\n--- a\n", 1, "not valid YAML or JSON"),
    "merge": ("a: &a {x: 1}\nb:\n  <<: *a\n", 3, "merge keys"),
    "merge of nonsense": ("a: 1\n<<: 5\n", 2, "merge keys"),
    "key twice": ("a: 1\nb: 2\na: 3\n", 3, "'a' is set twice"),
    "number as key": ("a: 1\n5: 2\n", 2, "the key '5' is not text"),
    "null as key": ("a: 1\n~: 2\n", 2, "the key '~' is not text"),
    "list as key": ("a: 1\n? [x]\n: 2\n", 2, "the key given here is not text"),
    "bomb as key": (BOMB[: BOMB.index("e:")] + "? *d\n: 2\n", 4, "the key given here is not text"),
    "tabs": ("a:\n\tb: 1\n", 2, "cannot start any token"),
    "two documents": ("a: 1\n---\nb: 1\n", 2, "another document"),
    "alias of nothing": ("a: 1\nb: *c\n", 2, "undefined alias"),
    "itself in a list": ("a: 1\nb: &b [*b]\n", 2, "refers to itself"),
    "itself in a mapping": ("b: &b\n  c: *b\n", 2, "refers to itself"),
    "aliases that explode": (BOMB, 5, "values, those of aliases counted"),
    "aliases that nest": (
        "x0: &x0 [1]\n" + "".join(f"x{n}: &x{n} [*x{n - 1}]\n" for n in range(1, 80)), None, "nested too deeply",
    ),
    "deep list": ("[" * 100_000, 1, "nested too deeply"),
    "deep mapping": ("{a: " * 100_000, 1, "nested too deeply"),
    "deep blocks": ("- " * 100_000, 1, "nested too deeply"),
    "deep but closed": ("[" * 60 + "]" * 60, 1, "nested too deeply"),
    "many values": ("- 1\n" * (MOST_VALUES + 9), MOST_VALUES + 1, "it holds more than"),
}  # fmt: skip
BAD_BYTES = {
    "not UTF-8": (b"a: 1\nb: \xff\n", 2, "not UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), 1, "not UTF-8"),
    "UTF-16 without a mark": ("a: 1\n".encode("utf-16-le"), 1, "the character U+0000"),
    "Latin-1": ("a: 1\ntitle: Käse\n".encode("latin-1"), 2, "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_yaml_is_one_sentence_with_its_line_and_takes_no_time(name: str) -> None:
    text, line, sentence = BAD[name]
    start = time.process_time()
    with pytest.raises(FileError) as raised:
        parse(text, "file.yaml")
    told = str(raised.value)
    assert sentence in told and "\n" not in told and len(told) < 300
    assert told.startswith("file.yaml:" if line is None else f"file.yaml:{line}: ")
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", BAD_BYTES)
def test_other_encodings_are_one_sentence_with_the_line(name: str, tmp_path) -> None:
    raw, line, sentence = BAD_BYTES[name]
    file = tmp_path / "file.yaml"
    file.write_bytes(raw)
    with pytest.raises(FileError, match=sentence.replace("+", r"\+")) as raised:
        read(file)
    assert str(raised.value).startswith(f"{file}:{line}: ")


def test_a_file_without_end_is_not_read_to_it(tmp_path) -> None:
    file = tmp_path / "file.yaml"
    file.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(FileError, match="too long"):
        read(file)
    with pytest.raises(FileError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"\xef\xbb\xbfa: 1\n", {"a": 1}),
        (b"a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        (b"a: 1\rb: 2\r", {"a": 1, "b": 2}),
        (b"a: &x [1, 2]\nb: *x\n", {"a": [1, 2], "b": [1, 2]}),
        (b"a: 2024-01-01\nb: yes\nc: ~\n", {"a": "2024-01-01", "b": True, "c": None}),
        (b"a: 0x10\nb: 1.5\nc: -1e3\n", {"a": 16, "b": 1.5, "c": "-1e3"}),
        ('a: "x\u2028y"\n'.encode(), {"a": "x\u2028y"}),
        (b"", None),
    ],
)  # fmt: skip
def test_good_yaml_is_read(raw: bytes, data: object, tmp_path) -> None:
    file = tmp_path / "file.yaml"
    file.write_bytes(raw)
    assert read(file).data == data


def test_lines_are_those_an_editor_shows() -> None:
    with pytest.raises(FileError, match=r"^f:3: 'b' is set twice"):
        parse('a: "x\u2028\u2029y"\nb: 1\nb: 2\n', "f")
