"""States of interrupted trainings that are damaged or of another model: one sentence, and they stay."""

from pathlib import Path

import pytest
import torch

from hfpatch.calibrate.training_state import STATE_FILE, load_state, of_this_model, save_state
from hfpatch.errors import ConfigError

FIELDS = ("step", "weights")


def test_a_state_comes_back(tmp_path: Path) -> None:
    assert load_state(tmp_path, FIELDS) is None
    save_state(tmp_path / "a", {"step": 3, "weights": torch.ones(2)})
    found = load_state(tmp_path / "a", FIELDS)
    assert found is not None and found["step"] == 3 and [p.name for p in (tmp_path / "a").iterdir()] == [STATE_FILE]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "zeros", "pickle", "others"])
def test_a_damaged_state_is_one_sentence(damage: str, tmp_path: Path) -> None:
    save_state(tmp_path, {"step": 3, "weights": torch.ones(2)})
    file = tmp_path / STATE_FILE
    whole = file.read_bytes()
    if damage == "others":
        torch.save([1, 2], file)
    elif damage == "pickle":
        torch.save({"step": 3, "weights": Path("x")}, file)
    else:
        file.write_bytes(
            {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"x", "zeros": b"\0" * 64 + whole[64:]}[damage]
        )
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="--fresh") as raised:
        load_state(tmp_path, FIELDS)
    assert "\n" not in str(raised.value) and file.read_bytes() == before


def test_a_state_of_another_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another model"), of_this_model(tmp_path):
        torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(3, 2).state_dict())
