"""The journal of a run: any text comes back, a torn line is dropped, other damage is refused, one run at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hfpatch.evals.errors import EvaluationError, FileError
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.journal import Journal
from hfpatch.evals.run.results import write_jsonl
from hfpatch.evals.run.runner import Run, clear, execute
from hfpatch.evals.run.variants import parse_variants

SEPARATORS = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\ud800", "\0"]
HEAD = b'{"run": {"seed": 0}}\n'
CELL = b'{"cell": "a", "data": {}, "samples": [], "seconds": 1, "model": {}}\n'
OTHER = CELL.replace(b'"a"', b'"b"')
DAMAGED = {
    "garbage": (HEAD + b"garbage\n" + CELL, 2),
    "blank line": (HEAD + b"\n" + CELL, 2),
    "blank at the end": (HEAD + CELL + b"\n", 3),
    "zeros": (HEAD + b"\0" * 64 + b"\n", 2),
    "zeros in the middle": (HEAD + b"\0" * 64 + CELL, 2),
    "number": (HEAD + CELL + b"5\n", 3),
    "null": (HEAD + b"null\n", 2),
    "list": (HEAD + b"[]\n", 2),
    "list for a head": (b"[]\n", 1),
    "number for a head": (b"5\n" + CELL, 1),
    "head without a run": (b'{"x": 1}\n', 1),
    "run that is no run": (b'{"run": 5}\n', 1),
    "no head": (CELL, 1),
    "two heads": (HEAD + HEAD, 2),
    "no cell": (HEAD + b'{"x": 1}\n', 2),
    "number for a cell": (HEAD + b'{"cell": 1}\n', 2),
    "cell twice": (HEAD + CELL + OTHER + CELL, 4),
    "data that are none": (HEAD + CELL.replace(b'"data": {}', b'"data": 5'), 2),
    "samples that are none": (HEAD + CELL.replace(b"[]", b"[5]"), 2),
    "seconds that are none": (HEAD + CELL.replace(b": 1,", b": NaN,"), 2),
    "model that is none": (HEAD + CELL.replace(b'"model": {}', b'"model": 0'), 2),
    "mark at the start": (b"\xef\xbb\xbf" + HEAD, 1),
    "not UTF-8": (HEAD + b"\xff\n", 2),
    "UTF-16": (HEAD.decode().encode("utf-16"), 1),
    "deep": (HEAD + b"[" * 100_000 + b"\n", 2),
    "deep and closed": (HEAD + b'{"cell": ' + b"[" * 90 + b"]" * 90 + b"}\n", 2),
    "long number": (HEAD + b'{"cell": "a", "seconds": ' + b"9" * 5000 + b"}\n", 2),
    "name twice": (HEAD + b'{"cell": "a", "cell": "b"}\n', 2),
    "words without an end": (b"notes of mine", 1),
    "words at the end": (HEAD + CELL + b"notes of mine", 3),
    "a whole line cut in two": (HEAD + CELL[:20] + b"\n" + CELL[20:], 2),
}


def journal(path: Path, seed: int = 0) -> Journal:
    return Journal(path / "cells.jsonl", {"seed": seed})


@pytest.mark.parametrize("mark", SEPARATORS, ids=ascii)
def test_any_separator_in_an_answer_comes_back(mark: str, tmp_path: Path) -> None:
    answer = f"one{mark}two"
    first = Journal(tmp_path / "cells.jsonl", {"title": answer}).open()
    first.add(f"cell {mark}", {"data": {"x": answer}, "samples": [{"output": answer}]})
    first.close()
    again = Journal(tmp_path / "cells.jsonl", {"title": answer}).open()
    assert again.done[f"cell {mark}"]["samples"] == [{"output": answer}]
    again.add("next", {"samples": []})
    assert again.path.read_bytes().count(b"\n") == 3
    write_jsonl(tmp_path / "samples.jsonl", [{"output": answer}])
    assert json.loads((tmp_path / "samples.jsonl").read_bytes()) == {"output": answer}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_journal_is_one_sentence_and_left_alone(name: str, tmp_path: Path) -> None:
    raw, line = DAMAGED[name]
    (tmp_path / "cells.jsonl").write_bytes(raw)
    with pytest.raises(FileError, match="--fresh") as raised:
        journal(tmp_path).open()
    told = str(raised.value)
    assert told.startswith(f"{tmp_path / 'cells.jsonl'}:{line}: ") and "\n" not in told and len(told) < 500
    assert (tmp_path / "cells.jsonl").read_bytes() == raw
    clear(tmp_path)
    assert not journal(tmp_path).open().done


TORN = {
    "cut": CELL[:40], "almost whole": CELL[:-2], "a letter": CELL[:1], "zeros": b"\0" * 100,
    "zeros after it": CELL[:30] + b"\0" * 99, "within a character": '{"cell": "ä'.encode()[:-1],
}  # fmt: skip


@pytest.mark.parametrize("name", TORN)
def test_a_torn_last_line_is_dropped_and_its_cell_run_again(name: str, tmp_path: Path) -> None:
    for whole, done in ((HEAD + OTHER, {"b"}), (HEAD, set())):
        (tmp_path / "cells.jsonl").write_bytes(whole + TORN[name])
        assert set(journal(tmp_path).read().done) == done
        assert (tmp_path / "cells.jsonl").read_bytes() == whole + TORN[name], "reading changes nothing"
        found = journal(tmp_path).open()
        assert set(found.done) == done
        assert found.path.read_bytes() == whole + TORN[name], "nor does opening"
        found.add("a", {"data": {}})
        found.close()
        assert found.path.read_bytes().startswith(whole + b'{"cell": "a", "data": {}}')
        assert set(journal(tmp_path).open().done) == {*done, "a"}


def test_a_torn_first_line_is_nothing_and_a_whole_last_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_bytes(HEAD[:9])
    assert not journal(tmp_path).open().done
    (tmp_path / "cells.jsonl").write_bytes(HEAD + CELL[:-1])
    found = journal(tmp_path).open()
    assert set(found.done) == {"a"} and found.path.read_bytes() == HEAD + CELL[:-1]
    found.add("b", {})
    assert found.path.read_bytes().startswith(HEAD + CELL) and found.path.read_bytes().count(b"\n") == 3


def test_what_has_not_been_read_is_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_bytes(HEAD + OTHER)
    journal(tmp_path).add("a", {})
    assert (tmp_path / "cells.jsonl").read_bytes().startswith(HEAD + OTHER)


def test_nothing_is_written_before_the_first_cell(tmp_path: Path) -> None:
    journal(tmp_path).open().close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = journal(tmp_path).open()
    found.add("a", {})
    before = found.path.read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(EvaluationError, match="No space left"):
            found.add("b", {})
    assert found.path.read_bytes() == before and "b" not in found.done
    found.add("c", {})
    assert set(journal(tmp_path).read().done) == {"a", "c"}


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    first = journal(tmp_path).open()
    for other in (journal(tmp_path, 5).open, journal(tmp_path).open, lambda: clear(tmp_path)):
        with pytest.raises(EvaluationError, match="in use by another run"):
            other()
    first.add("a", {})
    assert first.open() is first and set(first.done) == {"a"}, "its own may be opened again"
    first.close()
    assert set(journal(tmp_path).open().done) == {"a"}
    with pytest.raises(EvaluationError, match="other arguments"):
        journal(tmp_path, 5).open()
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_is_refused_while_another_has_its_folder(tmp_path: Path) -> None:
    run = Run("t", "embedded", parse_variants(["streaming"]), [NiahJob([64])])
    with open_elsewhere(tmp_path) as process:
        for fresh in (False, True):
            with pytest.raises(EvaluationError, match="in use by another run"):
                execute(run, tmp_path, fresh=fresh)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert set(journal(tmp_path).open().done) == {"theirs"}, "a killed process holds nothing"


def open_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """Another process that keeps a journal of the folder open."""
    code = (
        "import sys; from pathlib import Path; from hfpatch.evals.run.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]), {'seed': 0}).open(); j.add('theirs', {})\n"
        "print('open', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, str(folder / "cells.jsonl")], **pipes)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="locks of Unix")
@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL", "EIO", "EBADF"])
def test_where_locks_are_impossible_that_is_said(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(getattr(errno, code), "no such thing here")

    monkeypatch.setattr("fcntl.flock", flock)
    first = journal(tmp_path).open()
    assert "cannot be locked" in caplog.text and str(tmp_path) in caplog.text
    first.add("a", {})
    first.close()
    assert set(journal(tmp_path).open().done) == {"a"}
    assert [p.name for p in tmp_path.iterdir()] == ["cells.jsonl"]


def test_only_journals_of_processes_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "cells.backup.jsonl").write_bytes(HEAD)
    clear(tmp_path)
    assert (tmp_path / "cells.backup.jsonl").exists()


GOOD = {
    "data": {
        "grid": [{"depth": 0.0, "score": 1.0, "samples": 1}], "tokens": 60, "fallbacks": {},
        "question_in_sparse_part": False, "density_prefill": 1.0, "density_decode": 1.0,
    },
    "samples": [], "seconds": 1.0, "model": {"name": "m", "class": "c", "parameters": 1, "dtype": "float32"},
}  # fmt: skip
CELLS = {
    "no model": ("64", {k: v for k, v in GOOD.items() if k != "model"}, "it has no 'model'"),
    "no data": ("64", {k: v for k, v in GOOD.items() if k != "data"}, "it has no 'data'"),
    "empty data": ("64", {**GOOD, "data": {}}, "its data are not those of a cell"),
    "number for a grid": ("64", {**GOOD, "data": {**GOOD["data"], "grid": 5}}, "its data are not those of a cell"),
    "no score": ("64", {**GOOD, "data": {**GOOD["data"], "grid": [{"depth": 0.0}]}}, "needs 'score'"),
    "text for a density": ("64", {**GOOD, "data": {**GOOD["data"], "density_decode": "x"}}, "must be a number"),
    "empty model": ("64", {**GOOD, "model": {}}, "needs 'name'"),
    "cell of another run": ("512", GOOD, "this run has no cell"),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_its_job_cannot_read_is_refused_before_any_is_run(name: str, tmp_path: Path) -> None:
    length, record, sentence = CELLS[name]
    run = Run("t", "no/model", parse_variants([]), [NiahJob([64, 128])])
    kept = Journal(tmp_path / "cells.jsonl", run.arguments()).open()
    kept.add("niah | dense | 128", GOOD)
    kept.add(f"niah | dense | {length}", record)
    kept.close()
    before = kept.path.read_bytes()
    with pytest.raises(FileError, match=sentence) as raised:
        execute(run, tmp_path)
    assert str(raised.value).startswith(f"{kept.path}:3: ") and kept.path.read_bytes() == before
