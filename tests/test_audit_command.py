"""`hfpatch audit`: what it prints, what it writes, and that its figures are those of `Patch.audit`."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hfpatch.evals.run.generation import generate_tokens, text_ids
from hfpatch.evals.run.models import load_model
from hfpatch.evals.schema import first_problem, load_schema
from tiny_llama import save_tiny

from hfpatch import ConfigError, cli, patched
from hfpatch.core.audit_report import AuditReport
from hfpatch.draw import draw_masses, mass_tables

BLOCKS = "block_topk:budget=64,block_q=16,block_k=16,min_length=0,window_blocks=1,question_tokens=0"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(str(path))
    return str(path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    def call(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hfpatch", "audit", *map(str, words)])
        monkeypatch.setattr("hfpatch.cli.console.console._width", 200)
        with pytest.raises(SystemExit) as left:
            cli.main()
        out = capsys.readouterr()
        return left.value.code or 0, out.out, out.err

    yield call


def test_the_embedded_model_end_to_end(run: Run, tmp_path: Path) -> None:
    words = (
        "embedded",
        "-p",
        BLOCKS,
        "-p",
        "quest:budget=64,min_length=0",
        "--length",
        "300",
        "--rows",
        "7",
        "--new-tokens",
        "4",
    )
    code, text, err = run(*words, "--tiles", 2, "--seed", 5, "--out", tmp_path)
    assert code == 0, err
    data = json.loads((tmp_path / "audit.json").read_text())
    assert first_problem(load_schema("audit.schema.json"), data) is None
    assert (data["tokens"], data["new_tokens"], data["rows"], data["tiles"], data["seed"]) == (300, 4, 7, 2, 5)
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"

    loaded = load_model("embedded")
    blocks = {"budget": 64, "block_q": 16, "block_k": 16, "min_length": 0, "window_blocks": 1, "question_tokens": 0}
    for found, (name, settings) in zip(
        data["patches"], [("block_topk", blocks), ("quest", {"budget": 64, "min_length": 0})], strict=True
    ):
        with patched(loaded.model, name, **settings) as patch, patch.audit(7, tiles=2, seed=5) as audit:
            generate_tokens(loaded, text_ids(loaded, 300), 5)
        assert found["audit"] == json.loads(json.dumps(audit.report().to_dict()))
        assert found["report"]["lines"] == json.loads(json.dumps([x.to_dict() for x in patch.report().lines]))
        for line in audit.report().lines:
            assert str(line.mass) in text and line.best is not None and f"{line.best.mean:.3f}" in text
            assert line.calls == (4 if line.phase == "decode" else 1)
        sentence = audit.report().split()
        assert sentence is not None and sentence in text
    assert "tokens before the end: mass kept" in text and "quest:budget=64,min_length=0" in text
    layers = loaded.model.config.num_hidden_layers
    assert f"prefill: {layers} layers attended to every key" in text


def test_without_an_oracle_and_without_decoding(run: Run, folder: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the sea. " * 40)
    code, text, err = run(
        folder, "-p", BLOCKS, "--text", tmp_path / "text.txt", "--length", "128", "--new-tokens", "0", "--no-oracle",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "is lost in the tiles" not in text, err
    data = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert first_problem(load_schema("audit.schema.json"), data) is None
    lines = data["patches"][0]["audit"]["lines"]
    assert {(x["phase"], x["oracle_in_tiles"]) for x in lines} == {("prefill", None)}
    assert data["text"].endswith("text.txt") and data["tokens"] == 128 and data["tiles"] == 0


def test_a_patch_that_stays_dense_gives_figures_but_no_picture(run: Run, folder: str, tmp_path: Path) -> None:
    code, text, err = run(folder, "-p", "dense", "--length", "64", "--out", tmp_path)
    assert code == 0 and "prefill: 2 layers attended to every key" in text, err
    assert [p.name for p in tmp_path.iterdir()] == ["audit.json"] and "audit.png" not in text
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_masses({"dense": AuditReport.of({})}, tmp_path / "audit.png")


def test_every_layer_and_head_has_its_cell(tmp_path: Path, folder: str) -> None:
    loaded, reports = load_model(folder), {"none": AuditReport.of({})}
    with patched(loaded.model, "streaming", window=8, layers=1) as patch, patch.audit() as audit:
        generate_tokens(loaded, text_ids(loaded, 64), 2)
    reports["some"] = audit.report()
    tables = mass_tables(reports)
    assert list(tables) == [(name, phase) for name in reports for phase in ("prefill", "decode")]
    for line in audit.report().lines:
        table = tables["some", line.phase]
        assert table.shape == (2, 4) and bool(table[0].isnan().all())
        torch.testing.assert_close(table[1], torch.tensor(line.heads))
        assert bool(tables["none", line.phase].isnan().all())
    draw_masses(reports, tmp_path / "deep" / "audit.png")
    assert (tmp_path / "deep" / "audit.png").read_bytes()[:4] == b"\x89PNG"


BAD = {
    "no patch": ([], "Name one or several patches"),
    "near name": (["-p", "streming"], "did you mean 'streaming'"),
    "setting": (["-p", "streaming", "-s", "windw=3"], "No patch has a setting 'windw'"),
    "twice": (["-p", "streaming", "-p", "streaming"], "there twice"),
    "length": (["-p", "streaming", "--length", "long"], "--length 'long' cannot be read"),
    "lengths": (["-p", "streaming", "--length", "64,128"], "it takes one"),
    "short": (["-p", "streaming", "--length", "4"], "at least 16"),
    "positions": (["-p", "streaming", "--length", "64k"], "positions for 4096 tokens"),
    "rows": (["-p", "streaming", "--rows", "0"], "--rows 0 is out of range"),
    "tiles": (["-p", "streaming", "--tiles", "0"], "--tiles 0 is out of range"),
    "new tokens": (["-p", "streaming", "--new-tokens", "-1"], "--new-tokens -1 is out of range"),
    "text": (["-p", "streaming", "--text", "no-such.txt"], "cannot be read"),
    "binary": (["-p", "streaming", "--text", "BINARY"], "it is not UTF-8"),
    "empty": (["-p", "streaming", "--text", "EMPTY"], "of so few"),
    "dtype": (["-p", "streaming", "--dtype", "int3"], "dtype 'int3'"),
    "device": (["-p", "streaming", "--device", "toaster"], "no device 'toaster'"),
    "out": (["-p", "streaming", "--out", "EMPTY"], "Cannot write"),
    "taken": (["-p", "streaming", "--out", "TAKEN"], "audit.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_code_2(run: Run, folder: str, tmp_path: Path, name: str) -> None:
    words, sentence = BAD[name]
    files = {"BINARY": tmp_path / "binary", "EMPTY": tmp_path / "empty", "TAKEN": tmp_path / "taken"}
    files["BINARY"].write_bytes(b"\xff\xfe\x00")
    files["EMPTY"].write_text("")
    (files["TAKEN"] / "audit.png").mkdir(parents=True)
    words = [str(files.get(w, w)) for w in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    code, _, err = run(folder, *words, *out)
    assert code == 2 and sentence in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, _, err = run("./no-such-model", "-p", "streaming", "--out", tmp_path)
    assert code == 2 and "Cannot load" in err and len(err.strip().splitlines()) == 1
