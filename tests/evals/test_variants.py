"""What `--patch` names: a method with settings, or a saved config by its path, however paths are written."""

import pytest
from hfpatch.evals.run.variants import DENSE, parse_variants

from hfpatch import ConfigError, PatchConfig, UnknownMethodError
from hfpatch.config.registry import make_config

SAVED = PatchConfig([make_config("streaming", {"window": 7})])


@pytest.mark.parametrize(
    "spec",
    [
        r"C:\patches\dhsa", "C:/patches/dhsa.json", r"c:\my patches\a=b", "C:patches", r"C:patches\dhsa", r"out\dhsa",
        r"\\server\share\x", "//server/share/x", r".\dhsa", r"..\dhsa", r"streaming\new", r"D:\a+b\c:d", "a=b/dhsa",
        "run:1/dhsa", "a+b/dhsa", r"C:\patches\dhsa" "\\",
    ],
)  # fmt: skip
def test_what_is_written_like_a_path_is_one(spec):
    with pytest.raises(ConfigError, match="neither a folder, a JSON file nor"):
        parse_variants([spec])


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("my patch", "my patch"), ("a=b", "a=b"), ("a+b", "a+b"), ("c:d", "c:d"), ("streaming+dhsa", "streaming+dhsa"),
        ("streaming:window=99", "streaming:window=99"), ("in/x=y+z:w", "x=y+z:w"), (r"out\dhsa", "dhsa"),
        (r"C:\patches\dhsa", "dhsa"), ("плащ", "плащ"), ("./streaming", "streaming"), ("a.json.d/", "a.json.d"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_file", [False, True])
def test_what_is_there_is_a_path(spec, name, as_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SAVED.save_pretrained(spec)
    if as_file:
        (tmp_path / spec / "hfpatch_config.json").rename(tmp_path / "config.json")
        (tmp_path / spec).rmdir()
        (tmp_path / "config.json").rename(tmp_path / spec.rstrip("/"))
        spec = spec.rstrip("/")
    made = parse_variants([spec])[1]
    assert (made.name, made.config.methods[0].window) == (name, 7)


@pytest.mark.parametrize("spec", ["streaming", "dense+streaming", "streaming:window=64"])
def test_methods_stay_methods_beside_folders_of_their_name(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / spec).mkdir()
    SAVED.save_pretrained("streaming")
    assert parse_variants([spec])[1].config.methods[-1].window != 7


def test_other_specs_are_told_as_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for spec, error, part in (
        ("empty", ConfigError, "holds no hfpatch_config.json"),
        ("nosuch", UnknownMethodError, "no method called 'nosuch'"),
        ("c:window=3", UnknownMethodError, "no method called 'c'"),
        ("streaming:window", ConfigError, "not of the form name=value"),
        ("x" * 5000, UnknownMethodError, "no method"),
        ("x/" * 5000, ConfigError, "is neither a folder"),
        ("a\0b", ConfigError, "cannot be read"),
    ):
        with pytest.raises(error, match=part):
            parse_variants([spec])
    assert [v.name for v in parse_variants([])] == [DENSE]
