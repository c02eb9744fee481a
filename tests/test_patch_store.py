"""Saving is all or nothing: after any failure a folder holds the patch of before or the new one, whole."""

import builtins
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hfpatch import ConfigError, HfpatchError, PatchConfig, SaveError
from hfpatch.config.patch_config import CONFIG_FILE, TENSOR_FILE
from hfpatch.config.patch_store import DIGEST
from hfpatch.config.registry import make_config

PLAIN = PatchConfig([make_config("streaming", {"window": 7})])
Check = Callable[[], Any]


def gated(bias: float) -> PatchConfig:
    config = make_config("gated", {"form": "sigmoid", "start_bias": bias})
    return PatchConfig([config], None, {"0.layers.0.weight": torch.full((4, 32), bias)})


PATCHES = {"plain": PLAIN, "first": gated(1.0), "second": gated(2.0)}


def same(a: PatchConfig, b: PatchConfig) -> bool:
    tensors = a.tensors.keys() == b.tensors.keys() and all(torch.equal(t, b.tensors[k]) for k, t in a.tensors.items())
    return a.methods == b.methods and tensors


class Crash(BaseException):
    """The process ends here."""


CALLS: dict[str, tuple[Any, str]] = {
    "replace": (os, "replace"),
    "fsync": (os, "fsync"),
    "open": (os, "open"),
    "unlink": (Path, "unlink"),
    "write": (Path, "write_text"),
    "tensors": (safetensors.torch, "save_file"),
    "mkdir": (Path, "mkdir"),
}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=["full", "crash"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("old,new", [("plain", "first"), ("first", "second"), ("first", "plain"), ("first", "first")])
def test_a_save_cut_off_anywhere_leaves_one_of_the_two_patches(
    old: str, new: str, call: str, when: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call of each kind fails, with or without having done its work, until a save gets through."""
    owner, name = CALLS[call]
    real = getattr(owner, name)
    for n in range(20):
        folder = tmp_path / str(n)
        PATCHES[old].save_pretrained(folder)
        left = [n]

        def failing(*args: Any, left: list[int] = left, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] != -1:
                return real(*args, **kwargs)
            if when == "after":
                real(*args, **kwargs)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                PATCHES[new].save_pretrained(folder)
            except (HfpatchError, Crash) as raised:
                assert isinstance(raised, Crash if isinstance(error, Crash) else SaveError)
        found = PatchConfig.from_pretrained(folder)
        assert same(found, PATCHES[old]) or same(found, PATCHES[new])
        PATCHES[new].save_pretrained(folder)  # and a later save is not disturbed by what was left
        assert same(PatchConfig.from_pretrained(folder), PATCHES[new])
        if left[0] >= 0:
            return
    pytest.fail("it never got through")


@pytest.mark.parametrize("new", PATCHES)
@pytest.mark.parametrize("old", PATCHES)
def test_a_folder_holds_the_last_patch_and_nothing_else(old: str, new: str, tmp_path: Path) -> None:
    PATCHES[old].save_pretrained(tmp_path)
    PATCHES[new].save_pretrained(tmp_path)
    assert same(PatchConfig.from_pretrained(tmp_path), PATCHES[new])
    files = [CONFIG_FILE, TENSOR_FILE] if PATCHES[new].tensors else [CONFIG_FILE]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    modes = {oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()}
    (tmp_path / "other").write_text("")
    assert modes == {oct((tmp_path / "other").stat().st_mode & 0o777)}


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error"), RuntimeError("odd"), ValueError("odd"), TypeError("odd")]
)
def test_what_the_library_raises_is_told_as_our_own(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    PATCHES["first"].save_pretrained(tmp_path)

    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(SaveError, match=str(error)):
        PATCHES["second"].save_pretrained(tmp_path)
    assert same(PatchConfig.from_pretrained(tmp_path), PATCHES["first"])


def test_a_failed_save_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PATCHES["first"].save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SaveError, match="No space left on device"):
        PATCHES["second"].save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


NO_ROOM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (lambda f: f / "file", "cannot be written"),
    "below a file": (lambda f: f / "file" / "deep" / "er", "cannot be written"),
    "a folder in its place": (lambda f: f / "taken", "cannot be written"),
    "too long": (lambda f: f / ("x" * 300), "cannot be written"),
    "null": (lambda f: f"{f}/a\0b", "cannot be written"),
    "surrogate": (lambda f: f"{f}/\ud800", "cannot be written"),
    "none": (lambda f: None, "named by text or a Path"),
    "number": (lambda f: 5, "named by text or a Path"),
    "bytes": (lambda f: b"x", "named by text or a Path"),
    "list": (lambda f: [], "named by text or a Path"),
    "nothing": (lambda f: "", "named by text or a Path"),
}


@pytest.mark.parametrize("case", NO_ROOM)
def test_where_nothing_can_be_saved(case: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / CONFIG_FILE / "x").mkdir(parents=True)
    where, said = NO_ROOM[case]
    with pytest.raises(HfpatchError, match=said):
        PATCHES["first"].save_pretrained(where(tmp_path))


def test_missing_parents_are_made_and_links_are_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "blob"
    target.write_text("kept")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).symlink_to(target)
    PATCHES["first"].save_pretrained(folder)
    assert target.read_text() == "kept" and same(PatchConfig.from_pretrained(folder), PATCHES["first"])


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def denied(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            raise PermissionError(13, "Permission denied")
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: denied(self, mode, *a, **k))
    monkeypatch.setattr("io.open", denied)
    with pytest.raises(SaveError, match="Permission denied"):
        PLAIN.save_pretrained(tmp_path)


def test_a_reader_beside_a_writer_never_sees_a_mix(tmp_path: Path) -> None:
    PATCHES["first"].save_pretrained(tmp_path)
    stop = threading.Event()

    def save_again_and_again() -> None:
        while not stop.is_set():
            for name in ("second", "first", "plain"):
                PATCHES[name].save_pretrained(tmp_path)

    writer = threading.Thread(target=save_again_and_again)
    writer.start()
    try:
        for _ in range(100):
            found = PatchConfig.from_pretrained(tmp_path)
            assert any(same(found, p) for p in PATCHES.values())
    finally:
        stop.set()
        writer.join()


def views() -> dict[str, Tensor]:
    whole = torch.arange(64.0).view(8, 8)
    return {"0.layers.0.weight": whole[:4], "0.layers.1.weight": whole[2:6].mT, "0.layers.2.weight": whole}


def test_views_of_one_storage_are_saved_each_for_itself(tmp_path: Path) -> None:
    config = PatchConfig([make_config("gated", {})], None, views())
    config.save_pretrained(tmp_path)
    assert same(PatchConfig.from_pretrained(tmp_path), config)


@pytest.mark.parametrize(
    "tensors", [{"1.x": torch.ones(1)}, {"0": torch.ones(1)}, {0: torch.ones(1)}, {"0.x": [1]}, [], 5]
)
def test_tensors_that_belong_to_no_method_are_not_saved(tensors: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        PatchConfig(PLAIN.methods, None, tensors).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def swapped(folder: Path) -> None:
    gated(9.0).save_pretrained(folder / "other")
    os.replace(folder / "other" / TENSOR_FILE, folder / TENSOR_FILE)


MIXES: dict[str, Callable[[Path], Any]] = {
    "tensors gone": lambda f: (f / TENSOR_FILE).unlink(),
    "tensors of another save": swapped,
    "tensors changed": lambda f: (f / TENSOR_FILE).write_bytes((f / TENSOR_FILE).read_bytes()[:-1] + b"\1"),
    "digest of another kind": lambda f: changed(f, {DIGEST: "../../x"}),
    "digest a number": lambda f: changed(f, {DIGEST: 5}),
    "tensors a folder": lambda f: ((f / TENSOR_FILE).unlink(), (f / TENSOR_FILE).mkdir()),
}


def changed(folder: Path, more: dict[str, Any]) -> None:
    data = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**data, **more}))


@pytest.mark.parametrize("case", MIXES)
def test_a_config_and_tensors_of_different_saves_are_refused(case: str, tmp_path: Path) -> None:
    PATCHES["first"].save_pretrained(tmp_path)
    MIXES[case](tmp_path)
    with pytest.raises(ConfigError, match=r"another save|SHA-256"):
        PatchConfig.from_pretrained(tmp_path)


def test_a_config_written_by_hand_takes_the_tensors_beside_it(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"methods": [{"method": "zerotuning"}]}')
    save_file({"0.gamma": torch.full((8,), 2.0)}, tmp_path / TENSOR_FILE)
    assert set(PatchConfig.from_pretrained(tmp_path).tensors) == {"0.gamma"}


def test_tensors_left_over_are_told_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    PLAIN.save_pretrained(tmp_path)
    save_file({"0.gamma": torch.ones(8)}, tmp_path / TENSOR_FILE)
    heard: list[str] = []
    import hfpatch.config.patch_store as store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.logger, "warning", lambda text, *args: heard.append(text % args))
        assert not PatchConfig.from_pretrained(tmp_path).tensors
    assert len(heard) == 1 and "left over" in heard[0]
