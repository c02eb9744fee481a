"""States of interrupted calibrations: whole or none, damaged ones are one sentence and stay."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from hfpatch.calibrate import unfinished
from hfpatch.calibrate.unfinished import (
    STATE_FILE,
    Part,
    Unfinished,
    data_mark,
    finish,
    model_mark,
    optimizer_tensors,
    restore_optimizer,
)
from hfpatch.errors import ConfigError

RUN = {"recipe": {"rate": 0.1, "layers": (1, 2)}, "seed": 3}


def part() -> Part:
    return {"words": ["a"]}, {"weights": torch.arange(3.0)}


def state(folder: Path, total: int = 9) -> Unfinished:
    return Unfinished(folder, RUN, "steps", total)


def interrupted(folder: Path, steps: int = 3) -> str:
    kept = state(folder)
    with pytest.raises(KeyboardInterrupt) as end, kept.keeping(part):
        for _ in range(steps):
            with kept.step():
                pass
        raise KeyboardInterrupt
    return str(end.value.__dict__["__notes__"][0])


def test_a_state_comes_back(tmp_path: Path) -> None:
    assert state(tmp_path).load() is None
    assert interrupted(tmp_path, 0).endswith("nothing was kept.") and not list(tmp_path.iterdir())
    assert interrupted(tmp_path).startswith(f"3 of 9 steps are kept in {tmp_path}")
    kept = state(tmp_path)
    found = kept.load()
    assert found is not None and found[0] == part()[0] and torch.equal(found[1]["weights"], part()[1]["weights"])
    assert kept.done == 3 and [p.name for p in tmp_path.iterdir()] == [STATE_FILE]
    finish(tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_a_step_is_not_kept(tmp_path: Path) -> None:
    kept = state(tmp_path)
    with pytest.raises(KeyboardInterrupt) as end, kept.keeping(part):
        with kept.step():
            pass
        kept.save()
        with kept.step():
            pass
        with kept.step():
            raise KeyboardInterrupt
    assert end.value.__dict__["__notes__"][0].startswith("1 of 9 steps are kept"), "what stood before the half step"
    again = state(tmp_path)
    again.load()
    assert again.done == 1


def test_a_state_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = state(tmp_path)
    with kept.keeping(part):
        with kept.step():
            pass
        assert not list(tmp_path.iterdir()), "not at every step"
        monkeypatch.setattr(unfinished, "SECONDS", 0.0)
        with kept.step():
            pass
        assert kept.saved == 2 and (tmp_path / STATE_FILE).is_file()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    assert "since step 0 could not be kept" in interrupted(tmp_path / "a file")


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kept in (Unfinished(None, RUN, "steps", 9), Unfinished(tmp_path, RUN, "steps", 9, writes=False)):
        assert kept.load() is None
        with pytest.raises(KeyboardInterrupt), kept.keeping(part):
            with kept.step():
                pass
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())


DAMAGES = ["cut", "empty", "text", "zeros", "pickle", "no state", "no json", "list", "not ours", "no run"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_one_sentence(damage: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    file = tmp_path / STATE_FILE
    whole = file.read_bytes()
    if damage == "pickle":
        torch.save({"step": 3}, file)
    elif damage in ("no state", "no json", "list", "not ours", "no run"):
        told = {"no json": "{", "list": "[1]", "not ours": '{"a": 1}', "no run": '{"run": 1, "done": 3, "part": {}}'}
        save_file({}, file, {"state": told[damage]} if damage in told else None)
    else:
        file.write_bytes(
            {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"x", "zeros": b"\0" * 64 + whole[64:]}[damage]
        )
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="--fresh") as raised:
        state(tmp_path).load()
    assert "\n" not in str(raised.value) and file.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Unix")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / STATE_FILE)
    with pytest.raises(ConfigError, match="not a file"):
        state(tmp_path).load()


def test_the_sentence_names_what_differs(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(model, seed\)"):
        Unfinished(tmp_path, {**RUN, "seed": 4, "model": "x"}, "steps", 9).load()


def test_a_state_is_no_program(tmp_path: Path) -> None:
    """A file that would run code when unpickled is refused, and the code does not run."""
    evil = f"import os\nclass A:\n  def __reduce__(self): return os.mkdir, ({str(tmp_path / 'made')!r},)\n"
    code = evil + f"import torch; torch.save(A(), {str(tmp_path / STATE_FILE)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ConfigError, match="damaged"):
        state(tmp_path).load()
    assert not (tmp_path / "made").exists()


def test_marks_tell_models_and_texts_apart() -> None:
    def model(**changes: float) -> torch.nn.Module:
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias="bias" not in changes))
        with torch.no_grad():
            made[1].weight[0, 0] += changes.get("by", 0.0)
        return made.to(torch.bfloat16) if "half" in changes else made

    marks = [model_mark(model(**changes)) for changes in ({}, {"by": 1.0}, {"bias": 1.0}, {"half": 1.0})]
    assert len(set(marks)) == 4 and marks[0] == model_mark(model())
    a, b = torch.arange(6), torch.arange(6).view(2, 3)
    assert len({data_mark([a]), data_mark([b]), data_mark([a, a]), data_mark([a], "x"), data_mark([a.int()])}) == 5


def test_adam_goes_on_from_its_tensors() -> None:
    def stepped(count: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for n in range(count):
            step(layer, optimizer, n)
        return layer, optimizer

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, n: int) -> None:
        layer(torch.full((1, 3), float(n))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (layer, optimizer), (other, fresh) = stepped(2), stepped(0)
    other.load_state_dict(layer.state_dict())
    tensors = {k: t.clone() for k, t in optimizer_tensors(optimizer).items()}
    restore_optimizer(fresh, tensors)
    step(layer, optimizer, 2)
    step(other, fresh, 2)
    assert torch.equal(layer.weight, other.weight)
    wrong = {"0.exp_avg": torch.zeros(5)}, {"7.exp_avg": torch.zeros(2)}, {"0.step": torch.zeros(())}, {"x": tensors}
    for changes in wrong:
        own = {k: t for k, t in tensors.items() if changes.keys() != {"0.step"} or k == "0.step"} | changes
        with pytest.raises((ValueError, LookupError, AttributeError)):
            restore_optimizer(fresh, own)


def test_the_file_is_safetensors_with_json(tmp_path: Path) -> None:
    interrupted(tmp_path)
    told = {"run": state(tmp_path).run, "done": 3, "part": part()[0]}
    assert (tmp_path / STATE_FILE).read_bytes() == save(part()[1], {"state": json.dumps(told)})
