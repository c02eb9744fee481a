"""Every calibration: Ctrl-C keeps what was done and says so, the same command ends as if nothing had happened."""

import importlib
import json
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_interrupts import QUIET
from tiny_llama import save_tiny

from hfpatch import calibrate, cli
from hfpatch.calibrate.unfinished import STATE_FILE
from hfpatch.cli import console

SPARSE = ["--sparse-settings", '{"sink": 1, "window": 16}']
FLUX = ["flux", "--batch", "2", "--examples", "6", "--checks", "2", "--length", "120", *SPARSE]
DHSA = ["dhsa", "--texts", "6", "--length", "220", "--epochs", "2", "--text", "grammar", "--width", "8", "--force"]
CASES = {  # its words, how many steps they take, a change that makes another run of it, a change of its texts
    "act": (["act", "--examples", "8", "--shots", "1"], 8, ["--beta", "0.1"], ["--renamed"]),
    "dhsa by mass": ([*DHSA, "--labels", "mass"], 10, ["--rate", "0.1"], ["--text", "prose"]),
    "dhsa by text": ([*DHSA, "--labels", "sentences"], 10, ["--epochs", "3"], ["--text", "prose"]),
    "flux trained": ([*FLUX, "--steps", "6"], 6, ["--target-sparsity", "0.2"], ["--examples", "7"]),
    "flux ranked": ([*FLUX, "--router", "error"], 8, ["--sparse-settings", '{"window": 9}'], ["--seed", "3"]),
    "gated": (
        ["gated", "--texts", "5", "--steps", "6", "--length", "64", "--text", "grammar"], 6, ["--sparsity", "0.3"],
        ["--text", "prose"],
    ),
    "zerotuning": (
        ["zerotuning", "--examples", "8", "--seeds", "1", "--shots", "1"], 27, ["--layers", "1"], ["--renamed"],
    ),
    "zerotuning unseen": (
        ["zerotuning", "--data", "sentiment", "--examples", "8", "--unseen", "4", "--shots", "2", "--gammas", "2"], 33,
        ["--batch", "3"], ["--data", "subject"],
    ),
}  # fmt: skip
MORE = {"act": 4}  # passes that are counted, but not kept
STOP = 3
every = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two tiny models that differ in one matrix."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    save_tiny(str(one))
    save_tiny(str(two))
    weights = load_file(two / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"].mul_(1.5)
    save_file(weights, two / "model.safetensors", {"format": "pt"})
    return str(one), str(two)


class Command:
    """`hfpatch calibrate`, whose progress is counted and can be stopped as by Ctrl-C."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.steps = self.total = 0

    def __call__(self, words: list[str], model: str, out: Path, stop: int | None = None) -> tuple[int, str]:
        """Exit code, 130 for Ctrl-C, and what was told on stderr."""

        @contextmanager
        def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
            self.steps, self.total = 0, total
            yield advance

        def advance() -> None:
            self.steps += 1
            if self.steps == stop:
                raise KeyboardInterrupt

        self.monkeypatch.setattr(console, "progress", progress)
        argv = ["hfpatch", "calibrate", words[0], model, *words[1:], "--out", str(out), "--device", "cpu"]
        self.monkeypatch.setattr(sys, "argv", argv)
        self.capsys.readouterr()
        try:
            cli.main()
        except KeyboardInterrupt:
            return 130, self.capsys.readouterr().err
        except SystemExit as left:
            return int(left.code or 0), self.capsys.readouterr().err
        raise AssertionError("the command did not leave")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_list_has_every_calibration() -> None:
    """A new calibration without a case here, or that cannot go on from where it was stopped, fails."""
    found = set()
    for module in pkgutil.iter_modules(calibrate.__path__):
        name = f"{calibrate.__name__}.{module.name}{'.command' if module.ispkg else ''}"
        if hasattr(importlib.import_module(name), "add_commands"):
            found.add(module.name)
    assert found == {words[0] for words, *_ in CASES.values()}


@every
def test_an_interrupted_run_is_kept_and_ends_as_a_whole_one(
    name: str, models: tuple[str, str], command: Command, tmp_path: Path
) -> None:
    words, total = CASES[name][:2]
    passes = total + MORE.get(name, 0)
    assert command(words, models[0], tmp_path / "whole")[0] == 0
    assert command.steps == command.total == passes
    code, told = command(words, models[0], tmp_path / "cut", stop=STOP)
    kept = STOP - (name == "act")  # whose first pass is of the model as it is
    assert code == 130 and told.count("\n") == 1
    assert f"{kept} of {total} " in told and f"kept in {tmp_path / 'cut'}; the same command goes on" in told
    assert list(files(tmp_path / "cut")) == [STATE_FILE]
    assert command(words, models[0], tmp_path / "cut", stop=kept + 2)[0] == 130, "interrupted once more"
    assert command(words, models[0], tmp_path / "cut")[0] == 0
    assert command.steps == command.total == passes
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    for folder in ("whole", "cut"):
        assert not [p for p in (tmp_path / folder).rglob("*") if p.name.startswith(".") and p.is_dir()]


@every
def test_work_that_was_done_is_not_done_again(
    name: str, models: tuple[str, str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [0], torch.nn.Embedding.forward

    def counted(self: Any, ids: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return forward(self, ids)

    words = CASES[name][0]
    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    command(words, models[0], tmp_path / "whole")
    whole, calls[0] = calls[0], 0
    command(words, models[0], tmp_path / "cut", stop=CASES[name][1])
    calls[0] = 0
    assert command(words, models[0], tmp_path / "cut")[0] == 0
    assert calls[0] < 0.75 * whole
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@every
def test_another_run_does_not_go_on_from_it(
    name: str, models: tuple[str, str], command: Command, tmp_path: Path
) -> None:
    words, _, setting, texts = CASES[name]
    command(words, models[0], tmp_path, stop=STOP)
    before = files(tmp_path)
    for part, other, model in (
        ("", [*words, *setting], models[0]), ("text|examples", [*words, *texts], models[0]),
        ("model", words, models[1]),
    ):  # fmt: skip
        code, told = command(other, model, tmp_path)
        assert code == 2 and told.count("\n") == 1 and "holds an unfinished run with other settings" in told
        assert any(p in told for p in part.split("|")) and "--fresh" in told, told
        assert files(tmp_path) == before
    assert command([*words, "--fresh"], models[1], tmp_path, stop=1)[0] == 130
    assert command([*words, "--fresh"], models[1], tmp_path)[0] == 0 and STATE_FILE not in files(tmp_path)


def damaged(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[tuple[dict[str, Any], Any]]:
    """States that no start of this run has written: another count, tensors or data missing or of other sizes."""
    yield {**state, "done": 999}, tensors
    yield {**state, "done": "3"}, tensors
    if state["part"]:
        yield {**state, "part": {key: [{}] for key in state["part"]}}, tensors
        yield {**state, "part": {}}, tensors
    if tensors:
        yield state, {}
        yield state, {k: t.flatten()[:1].repeat(3, 5) for k, t in tensors.items()}


@every
def test_a_state_that_does_not_fit_is_one_sentence(
    name: str, models: tuple[str, str], command: Command, tmp_path: Path
) -> None:
    words = CASES[name][0]
    command(words, models[0], tmp_path, stop=STOP)
    file = tmp_path / STATE_FILE
    with safe_open(file, "pt") as held:
        state = json.loads(held.metadata()["state"])
    for changed, own in damaged(state, load_file(file)):
        save_file(own, file, {"state": json.dumps(changed)})
        before = file.read_bytes()
        code, told = command(words, models[0], tmp_path)
        assert code == 2 and told.count("\n") == 1 and "--fresh" in told, (changed, told)
        assert file.read_bytes() == before


def test_ctrl_c_before_the_work_begins(
    models: tuple[str, str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfpatch.evals.run import models as loading

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    words, out = CASES["gated"][0], tmp_path / "new"
    assert command(words, models[0], out, stop=1)[0] == 130
    monkeypatch.setattr(loading, "load_model", stop)
    code, told = command(words, models[0], out)
    assert code == 130 and "still holds what an earlier start has kept" in told and told.count("\n") == 1
    code, told = command(words, models[0], tmp_path / "other")
    assert code == 130 and "nothing was kept" in told and not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_signals_keep_what_was_done(number: int, models: tuple[str, str], tmp_path: Path) -> None:
    start = "import hfpatch.calibrate.unfinished as u; u.SECONDS = 0; from hfpatch.cli import main; main()"
    words = [sys.executable, "-c", start, "calibrate", *CASES["gated"][0], models[0], "--out", str(tmp_path)]
    process = subprocess.Popen([*words, "--steps", "99999"], stderr=subprocess.PIPE, text=True, env=QUIET)
    while not (tmp_path / STATE_FILE).is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and told.count("\n") == 1 and "of 99999 steps are kept in" in told


@pytest.mark.parametrize("width", [20, 34, 44, 60, 80, 200])
def test_counts_are_whole_on_any_screen(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = console.Console(stderr=True, force_terminal=True, width=width, legacy_windows=False)
    monkeypatch.setattr(console, "errors", screen)
    with console.progress("boundary predictor", 190) as advance:
        for _ in range(34):
            advance()
    assert "34/190" in capsys.readouterr().err
