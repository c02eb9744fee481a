"""Every option of every command with numbers and words that make no sense: one line, exit code 2, nothing written."""

import os
import sys
import typing
from pathlib import Path

import pytest
from tiny_llama import save_tiny

from hfpatch import cli
from hfpatch.calibrate import act, gated, zerotuning
from hfpatch.calibrate.dhsa import command as dhsa_command
from hfpatch.calibrate.flux import command as flux
from hfpatch.cli import audit as cli_audit
from hfpatch.cli import evaluate as cli_eval
from hfpatch.cli.console import LONGEST, one_line
from hfpatch.cli.options import numbers
from hfpatch.errors import ConfigError

COMMANDS = {
    ("niah",): cli_eval.niah, ("bench",): cli_eval.bench, ("inspect", "-p", "dhsa"): cli_eval.inspect,
    ("audit", "-p", "dhsa"): cli_audit.audit,
    ("calibrate", "act"): act.act, ("calibrate", "zerotuning"): zerotuning.zerotuning,
    ("calibrate", "gated"): gated.gated, ("calibrate", "dhsa"): dhsa_command.dhsa, ("calibrate", "flux"): flux.flux,
}  # fmt: skip
TEXTS_WITH_NUMBERS = {"lengths", "length", "depths"}
NUMBERS = [
    "-1",
    "-" + "9" * 30,
    "9" * 30,
    "9" * 5000,
    "²",
    "nan",
    "inf",
    "-inf",
    "",
    "x",
    "1e999",
    "0x10",
    "[1]",
    "1;2",
]


def numeric_options() -> list[tuple[tuple[str, ...], str]]:
    """Every command with each of its options that takes a number."""
    found = []
    for words, command in COMMANDS.items():
        for name, hint in typing.get_type_hints(command).items():
            if hint in (int, float, int | None, float | None) or name in TEXTS_WITH_NUMBERS:
                found.append((words, name))
    return found


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run the command, which must refuse; returns its one line."""

    def call(*words: str, out: Path | None = tmp_path / "a" / "b") -> str:
        monkeypatch.setattr(sys, "argv", ["hfpatch", *words, *(["--out", str(out)] if out else [])])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        assert left.value.code == 2 and told.out == "" and "Traceback" not in told.err, told
        assert told.err.startswith("hfpatch: ") and len(told.err.strip().splitlines()) == 1
        assert len(told.err) < 1500 and not list(tmp_path.iterdir())
        return told.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return str(path)


def test_there_are_numeric_options_of_every_command() -> None:
    assert len(numeric_options()) >= 38 and {words for words, _ in numeric_options()} == set(COMMANDS)


@pytest.mark.parametrize(("words", "name"), numeric_options(), ids=lambda x: x if isinstance(x, str) else x[-1])
def test_numbers_that_make_no_sense_are_refused(refused, words, name) -> None:
    kind = typing.get_type_hints(COMMANDS[words])[name]
    for value in NUMBERS:
        told = refused(words[0], *words[1:], "no/model", f"--{name.replace('_', '-')}={value}")
        assert name.replace("_", "-") in told or name in told, (value, kind)


BAD = {
    "meta device": (["niah", "F", "--device", "meta"], "device 'meta' cannot be used"),
    "device that is not there": (["niah", "F", "--device", "xpu"], "device 'xpu' cannot be used"),
    "deep settings": (["niah", "F", "-p", "streaming", "--patch-args", "[" * 100_000], "is not valid JSON"),
    "deep setting": (["niah", "F", "-p", "streaming", "--set", "window=" + "[" * 100_000], "wrong type"),
    "settings that are a list": (["niah", "F", "-p", "streaming", "--patch-args", "[]"], "takes a JSON object"),
    "a setting twice": (["niah", "F", "-p", "streaming", "--patch-args", '{"a": 1, "a": 2}'], "is set twice"),
    "half a character": (["niah", "F", "--haystack", "\udcff"], "is not UTF-8"),
    "half a character in a patch": (["check", "F", "-p", "stream\ud800"], "is not UTF-8"),
    "no such option": (["niah", "F", "--sample", "3"], "No such option"),
    "no model": (["niah"], "Missing argument"),
    "no such command": (["nihah", "F"], "No such command 'nihah'"),
    "no such calibration": (["calibrate", "nothing", "F"], "No such command 'nothing'"),
    "router": (["calibrate", "flux", "F", "--router", "x"], "--router 'x' is not one of learned"),
    "sparse settings": (["calibrate", "flux", "F", "--sparse-settings", "["], "--sparse-settings '[' is not valid"),
    "deep sparse settings": (["calibrate", "flux", "F", "--sparse-settings", "[" * 9999], "nested too deeply"),
    "several lengths": (["inspect", "F", "-p", "dhsa", "--length", "64,128"], "it takes one"),
    "no text": (["inspect", "F", "-p", "dhsa", "--text", "no-such-file"], "cannot be read (No such file"),
    "text that is none": (["inspect", "F", "-p", "dhsa", "--text", os.devnull], "nothing can be drawn"),
    "bytes for a text": (["inspect", "F", "-p", "dhsa", "--text", sys.executable], "it is not UTF-8"),
    "recipe of a long name": (["run", "x" * 5000], "There is no recipe"),
    "place that is no number": (["run", "quickstart", "--set", "tasks.².samples=1"], "there is no '²'"),
    "place of many digits": (["run", "quickstart", "--set", f"tasks.{'9' * 5000}.samples=1"], "99' in this recipe"),
    "number with a point": (["run", "quickstart", "--set", "niah.samples=1.0"], "must be a whole number"),
    "long number": (["run", "quickstart", "--set", "seed=" + "9" * 5000], "must be a whole number"),
    "no length the model has": (["calibrate", "gated", "F", "--length", "99999"], "positions for 4096 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_words_are_one_line(refused, folder, name) -> None:
    words, sentence = BAD[name]
    out = {"out": None} if words[0] in ("check", "nihah") or name == "no such calibration" else {}
    assert sentence in refused(*(folder if w == "F" else w for w in words), **out)


LAUNCHES = [
    ("RANK", "x"), ("RANK", "3"), ("RANK", "9" * 5000), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "²"),
    ("LOCAL_RANK", "1.5"),
]  # fmt: skip


@pytest.mark.parametrize("command", [["list"], ["niah", "no/model"], ["calibrate", "flux", "no/model"]])
@pytest.mark.parametrize(("name", "value"), LAUNCHES)
def test_a_launch_that_makes_no_sense_is_refused(refused, monkeypatch, command, name, value) -> None:
    monkeypatch.setenv(name, value)
    told = refused(*command, out=None if command == ["list"] else Path("unused"))
    assert f"{name}={value}"[:20] in told.replace("'", "") and "unset" in told


def test_processes_that_do_not_meet_are_told_so(refused, monkeypatch, folder) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "cannot reach each other" in refused("niah", folder, "--lengths", "64")


def test_numbers_are_read() -> None:
    assert numbers("512, 4k,512,1K", "lengths", low=1) == [512, 4096, 1024]
    for text in ("٣", "1_0", "+1", "1.0", "1 0x", "k", ",", "1,,2"):
        with pytest.raises(ConfigError, match="cannot be read"):
            numbers(text, "lengths", low=0)


def test_any_message_becomes_one_line() -> None:
    assert one_line("a\nb\u2028c\x1b[31m \ud800") == "a b c\\x1b[31m \\ud800"
    assert len(one_line("x" * 10**5)) < LONGEST + 10
