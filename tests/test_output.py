"""Folders that cannot be written are found out before any work, and nothing is left of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny

from hfpatch import cli
from hfpatch.errors import ConfigError
from hfpatch.files.output import own_folder, writable, write_json

OLD = "a file that was there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return str(path)


def impossible(tmp_path: Path) -> dict[str, Path]:
    """Folders nobody can write to, whoever asks."""
    (tmp_path / "file").write_text(OLD)
    (tmp_path / "taken" / "cells.jsonl").mkdir(parents=True)
    (tmp_path / "taken" / "hfpatch_config.json").mkdir()
    (tmp_path / "taken" / "calibration.json").mkdir()
    return {
        "a file": tmp_path / "file", "in a file": tmp_path / "file" / "a" / "b",
        "long": tmp_path / "new" / ("x" * 300) / "y",
        "of the system": Path("/proc/x/y"), "there but closed": Path("/proc"),
        "zero": tmp_path / "new" / "a\0b", "names taken": tmp_path / "taken",
    }  # fmt: skip


KINDS = ["a file", "in a file", "long", "of the system", "there but closed", "zero", "names taken"]
COMMANDS = {
    "niah": ["niah", "F"], "bench": ["bench", "F"], "run": ["run", "dhsa"], "demo": ["demo"],
    "inspect": ["inspect", "F", "-p", "dhsa"], "act": ["calibrate", "act", "F"], "dhsa": ["calibrate", "dhsa", "F"],
    "flux": ["calibrate", "flux", "F"], "gated": ["calibrate", "gated", "F"],
    "zerotuning": ["calibrate", "zerotuning", "F"],
}  # fmt: skip


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_at_once(name, folder, tmp_path, monkeypatch, capsys) -> None:
    def forward(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model runs before the folder is tried")

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    places = impossible(tmp_path)
    before = contents(tmp_path)
    for kind, out in places.items():
        if kind == "zero" or (kind == "names taken" and name == "inspect"):
            continue  # no argument holds a zero; what inspect writes depends on the layer
        words = [folder if w == "F" else w for w in COMMANDS[name]]
        monkeypatch.setattr(sys, "argv", ["hfpatch", *words, "--out", str(out)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and "another --out" in told, (kind, told)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_written_is_refused_and_left_as_it_was(kind, tmp_path) -> None:
    out = impossible(tmp_path)[kind]
    before = contents(tmp_path)
    for block in (writable, own_folder):
        with pytest.raises(ConfigError, match="choose another --out"), block(out, ("cells.jsonl",)):
            raise AssertionError("not reached")
    assert contents(tmp_path) == before and (tmp_path / "file").read_text() == OLD


def test_lm_eval_tries_its_folder_first(folder, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "file").write_text(OLD)
    words = ["lm-eval", "--model_args", f"pretrained={folder}", "--tasks", "no_such_task", "--output_path"]
    for out in (tmp_path / "file" / "a", tmp_path / "file" / "results.json"):
        monkeypatch.setattr(sys, "argv", ["hfpatch", *words, str(out)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2 and "Cannot write to" in capsys.readouterr().err
    assert contents(tmp_path) == {"file"}


def test_what_was_made_goes_when_the_block_fails_and_it_is_empty(tmp_path) -> None:
    out = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), own_folder(out):
        assert out.is_dir()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), writable(out):
        write_json(out / "x.json", {"a": 1})
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a", "a/b", "a/b/x.json"}
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), writable(tmp_path / "mine"):
        raise ZeroDivisionError
    assert (tmp_path / "mine").is_dir(), "a folder that was there stays"


def test_a_calibration_has_its_folder_to_itself(tmp_path) -> None:
    code = (
        "import sys; from hfpatch.files.output import own_folder\nwith own_folder(sys.argv[1]): print('in'); input()"
    )
    with own_folder(tmp_path / "a"):
        with pytest.raises(ConfigError, match="Another process writes"), own_folder(tmp_path / "a"):
            pass
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
        assert done.returncode and "Another process writes" in done.stderr
    with own_folder(tmp_path / "a"):
        pass
    assert not list((tmp_path / "a").iterdir())


def test_files_are_written_as_a_whole(tmp_path, monkeypatch) -> None:
    write_json(tmp_path / "x.json", {"a": "\ud800\u2028"})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"a": "\ud800\u2028"}

    def fail(*names: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "x.json", {"a": 2})
    assert contents(tmp_path) == {"x.json"} and "2028" not in (tmp_path / "x.json").read_text()
