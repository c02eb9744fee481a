"""Ctrl-C and SIGTERM: nothing printed, 128 + signal as exit code, at any time, what was begun put away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
START = """
import os, signal, sys, time, threading
from hfpatch.cli.interrupts import quiet_end
import hfpatch.cli.interrupts
hfpatch.cli.interrupts.PATIENCE = 0.5
def come(number=signal.SIGINT): os.kill(os.getpid(), number)
"""
BLOCKS = {
    "in a block": ("try:\n  come(); time.sleep(9)\nfinally:\n  print('put away')", 130, "put away\n"),
    "to end": ("try:\n  come(signal.SIGTERM); time.sleep(9)\nfinally:\n  print('put away')", 143, "put away\n"),
    "turned into another error": ("try:\n  come(); time.sleep(9)\nexcept BaseException:\n  1 / 0", 130, ""),
    "while an error is told": ("try:\n  1 / 0\nfinally:\n  come(); time.sleep(9)", 130, ""),
    "swallowed": ("try:\n  come(); time.sleep(9)\nexcept BaseException:\n  pass", 130, ""),
    "where nothing can be raised": ("class A:\n  def __del__(self): come(); time.sleep(9)\nA(); come = 0", 130, ""),
    "twice": ("try:\n  come(); time.sleep(9)\nfinally:\n  come(); print('not reached')", 130, ""),
    "leaving by itself": ("sys.exit(3)", 3, ""),
    "not at all": ("print('done')", 0, "done\n"),
}  # fmt: skip


def run(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_ends_quietly(name: str) -> None:
    block, code, told = BLOCKS[name]
    inner = block.replace("\n", "\n  ")
    done = run(f"with quiet_end():\n  {inner}")
    assert (done.returncode, done.stdout, done.stderr) == (code, told, "")


def test_what_swallows_signals_is_ended_after_a_while() -> None:
    block = "while True:\n    try:\n      come(2); time.sleep(9)\n    except BaseException:\n      come = id"
    done = run(f"with quiet_end():\n  {block}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_after_the_block_an_exit_stays_quiet_and_a_programs_own_handlers_are_its_own() -> None:
    late = "import atexit\natexit.register(lambda: (come(), time.sleep(9)))\nwith quiet_end():\n  pass"
    done = run(late)
    assert (done.returncode, done.stderr) == (130, "")
    kept = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwith quiet_end():\n  come(); print('goes on')\n"
        "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    )
    assert run(kept).stdout == "goes on\nTrue True\n"
    thread = "t = threading.Thread(target=lambda: quiet_end().__enter__())\nt.start(); t.join(); print('done')"
    assert run(thread).stdout == "done\n"


NIAH = ["niah", "embedded", "--lengths", "64,1024", "--samples", "50", "--out"]
WHEN_IMPORTED = """
import sys, os, signal
name = sys.argv.pop(1)
class Finder:
    def find_spec(self, found, path=None, target=None):
        if found == name:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from hfpatch.cli import main
main()
"""
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


LATE = [pytest.param(m, marks=pytest.mark.slow) for m in ("transformers.modeling_utils", "matplotlib.pyplot")]


@pytest.mark.parametrize("module", ["typer", "rich.console", "torch", "torch.nn", *LATE])
def test_the_command_ends_quietly_while_it_is_loaded(module: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", WHEN_IMPORTED, module, *NIAH, str(tmp_path / "a" / "b")]
    done = subprocess.run(words, capture_output=True, text=True, env=QUIET, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "") and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_quietly_while_it_works_and_keeps_what_is_done(number: int, tmp_path: Path) -> None:
    journal = tmp_path / "a" / "b" / "cells.jsonl"
    words = [sys.executable, "-m", "hfpatch.cli", *NIAH, str(journal.parent)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET)
    while not journal.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", "")
    assert [p.name for p in journal.parent.iterdir()] == ["cells.jsonl"]
    assert journal.read_bytes().count(b"\n") >= 2


def test_the_command_begins_without_what_takes_time() -> None:
    code = (
        "import sys, hfpatch.cli; print([m for m in ('torch', 'transformers', 'typer', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
