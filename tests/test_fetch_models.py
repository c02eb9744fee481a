"""The script that fetches models for the tests marked `real`, offline: what it says, and what it leaves alone."""

from pathlib import Path

import fetch_models
import pytest


def test_without_the_hub_every_model_is_named_and_what_to_do(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as left:
        fetch_models.main([str(tmp_path), "smollm2", "gemma3"])
    told = str(left.value.code)
    assert told.startswith("not fetched: smollm2, gemma3. The Hub has to be reached") and "Gemma's terms" in told
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("smollm2: HuggingFaceTB/SmolLM2-135M-Instruct cannot be fetched: ")


def test_what_is_there_is_left_and_the_rest_is_asked_for_by_its_id(tmp_path, monkeypatch, capsys) -> None:
    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr(
        fetch_models, "snapshot_download", lambda name, local_dir, **more: asked.append((name, local_dir))
    )
    there = tmp_path / "qwen05"
    there.mkdir()
    for file in ("config.json", "model.safetensors"):
        (there / file).write_text("{}")
    fetch_models.main([str(tmp_path)])
    assert asked == [(fetch_models.MODELS[n], tmp_path / n) for n in ("smollm2", "gemma3")]
    assert f"qwen05: already in {there}" in capsys.readouterr().out


def test_unknown_names_are_refused_with_the_known_ones(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        fetch_models.main([str(tmp_path), "llama"])
    assert left.value.code == 2 and "no model 'llama'; choose from smollm2, qwen05, gemma3" in capsys.readouterr().err
