"""`benchmarks/gpu.py` on a CPU, so that it cannot fail on the day there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hfpatch.ops import Executor, executors, register_executor

pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
FOLDERS = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "ops"), str(ROOT / "tests" / "ops")]
TIMES = {"ms", "low", "high", "ratio", "select_ms", "attend_ms", "ttft_ms", "tpot_ms", "tflops"}
FAMILY = "torch decode blocks16 bfloat16 128/128 wide"
BAD = """
import os, signal, time
from hfpatch.core.selection import Causal, SinkWindow
from hfpatch.ops import Executor, list_executors, register_executor

right = {e.name: e for e in list_executors()}["torch"]

def crooked(p):
    out, lse = right.run(p)
    return out * 1.05, lse

def on(kind):
    def supports(p):
        plain = p.softcap is None and p.sinks is None and p.bias is None and p.q.shape[1:] == (4, 45, 128)
        usual = p.q.stride(-2) == 512 and str(p.q.dtype) == "torch.bfloat16" and p.v.shape[-1] == 128
        return None if isinstance(p.selection, kind) and plain and usual else "another problem"
    return supports

register_executor(Executor("crooked", lambda p: None, crooked))
register_executor(Executor("hanging", on(SinkWindow), lambda p: time.sleep(10000)))
register_executor(Executor("dying", on(Causal), lambda p: os.kill(os.getpid(), signal.SIGSEGV)))
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the script can be imported."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)


def started(folder: Path, *words: str) -> tuple[int, list[dict[str, Any]], dict[str, Any], str]:
    """Status, rows, gpu.json and gpu.md of a dry run."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows, done.stderr
    kept = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    data = json.loads((folder / "gpu.json").read_text())
    assert rows == kept == data["rows"]
    return done.returncode, rows, data, (folder / "gpu.md").read_text()


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    status, rows, data, page = started(tmp_path, "--budget", "1200")
    assert status == 0, [r for r in rows if r["status"] in ("wrong", "failed", "missing")]
    for part in range(7):
        mine = [r for r in rows if r["part"] == part and r["status"] == "ok"]
        assert mine and all(r["card"] == "dry run on a CPU" for r in mine), part
        assert not data["parts"][str(part)]["missing"]
    assert {r["executor"] for r in rows if r["part"] == 1 and r["status"] == "ok" and "executor" in r} >= {
        "torch",
        "triton",
    }
    assert {r["method"] for r in rows if r["part"] == 2} > {"quest", "dhsa", "flux"}
    assert all(r["undone"] for r in rows if r["part"] == 2 and r["status"] == "ok")
    flash = [r for r in rows if r["part"] in (1, 3) and r.get("executor") == "flash"]
    assert {r["part"] for r in flash} == {1, 3} and all("needs an NVIDIA GPU" in r["why"] for r in flash)
    assert {r["patch"] for r in rows if r["part"] == 5 and r["status"] == "ok" and r["cache"] == "dynamic"} >= {
        "unpatched", "dense", "streaming", "block_topk+quest", "dhsa", "flux cropped"
    }  # fmt: skip
    assert {bar["state"] for bar in data["bars"]} <= {"dry run", "not measured"} and "its figures mean nothing" in page


@pytest.mark.slow
def test_what_is_wrong_hangs_or_dies_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    given = ["--with", str(tmp_path / "bad.py"), "--parts", "1", "3", "--case", "40", "--budget", "1200"]
    status, rows, _, page = started(tmp_path / "out", *given)
    assert status == 1
    found = {name: [r for r in rows if r.get("executor") == name] for name in ("crooked", "triton", "torch")}
    assert len(found["crooked"]) > 30 and {r["status"] for r in found["crooked"]} == {"wrong"}
    assert not [r for r in found["crooked"] if TIMES & r.keys()]
    assert any("part 1 found it wrong" in r["why"] for r in found["crooked"] if r["part"] == 3)
    for name in ("triton", "torch"):
        assert {r["status"] for r in found[name]} == {"ok"} and any(TIMES & r.keys() for r in found[name])
    lost = {r["case"].rpartition(": ")[2]: r for r in rows if r["status"] == "failed"}
    assert lost.keys() == {"hanging", "dying"}
    assert "killed" in lost["hanging"]["why"] and "signal 11" in lost["dying"]["why"]
    assert "## Wrong, and so without a time" in page and "## Failed" in page


def crooked(p: Any) -> Any:
    """Almost right."""
    out, lse = executors._EXECUTORS["torch"].run(p)
    return out * 1.05, lse


def test_a_wrong_executor_gets_no_time(parts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gpu_parts import kernels
    from gpu_parts.context import Context
    from gpu_parts.device import Device
    from gpu_parts.plan import Options

    monkeypatch.setattr(executors, "_EXECUTORS", dict(executors._EXECUTORS))
    register_executor(Executor("crooked", lambda p: None, crooked))
    options = Options(
        dry=True, log=str(tmp_path / "log"), failed=frozenset(["torch decode blocks16 bfloat16 128/128 wide"])
    )
    context = Context(Device(dry=True), options)
    with torch.no_grad():
        for phase, name, status in (
            ("prefill", "torch", "ok"), ("prefill", "crooked", "wrong"), ("decode", "torch", "wrong"),
            ("prefill", "flash", "skipped"),
        ):  # fmt: skip
            (row,) = kernels._executor_row(context, kernels.Timed(phase, "blocks", "8k"), name)
            assert row["status"] == status and row["executor"] == name
            assert (status == "ok") == bool(TIMES & row.keys())


def test_float64_agrees_with_the_reference(parts: None) -> None:
    from gpu_parts.exact import apart, exact, judge
    from gpu_parts.problems import KINDS, Spec, _small

    for kind in KINDS:
        p = _small(
            Spec(kind, hq=4, hkv=2, d=16, dv=16, dtype=torch.float32, extras=("sinks", "softcap", "bias"))
        ).make(torch.device("cpu"))
        truth = exact(p)
        assert judge(p, "reference", truth, None)["status"] == "ok", kind
        rows = torch.tensor([0, 7, p.at.Lq - 1])
        some = exact(p, rows)
        assert apart(truth[0][:, rows], some[0]) < 1e-12 and apart(truth[1][:, :, rows], some[1]) < 1e-12
    assert judge(p, "reference", (truth[0] * 1.001, truth[1]), None)["why"].startswith("error 1.0e-03, allowed 1e-05")


def test_unwritten_memory_is_seen(parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_parts.exact import exact, judge
    from gpu_parts.problems import Spec, _small

    p = _small(Spec("window")).make(torch.device("cpu"))

    def lazy(p: Any) -> Any:
        out, lse = executors._EXECUTORS["torch"].run(p)
        left = torch.empty_like(out)
        left[:, 1:] = out[:, 1:]
        return left, lse

    monkeypatch.setattr(executors, "_EXECUTORS", dict(executors._EXECUTORS))
    register_executor(Executor("lazy", lambda p: None, lazy))
    found = judge(p, "lazy", exact(p), None)
    assert found["status"] == "wrong" and not found["written"] and "NaN in the output" in found["why"]


def toy(pipe: Any, part: int | None, lane: int, lanes: int, options: Any) -> None:
    """A part in which one case dies, one hangs and one is wrong."""
    os.setsid()
    pipe.send({"ready": "toy card"})
    if part is None:
        return
    names = ["good", "dies", "hangs", "wrong", "last"] if part == 1 else [f"after {sorted(options.failed)}", "endless"]
    pipe.send({"cases": names})
    for name in names:
        if name in options.done:
            continue
        pipe.send({"begin": name, "family": f"family {name}", "limit": None})
        if name == "dies":
            os._exit(3)
        if name in ("hangs", "endless"):
            time.sleep(10000)
        pipe.send({"row": {"status": "wrong" if name == "wrong" else "ok", "why": "crooked"}})
        pipe.send({"end": name, "s": 0.1})


def broken(pipe: Any, *_: Any) -> None:
    """A card that does not answer."""
    pipe.send({"broken": "RuntimeError: no card"})


@pytest.fixture
def run(parts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Runs toy parts, which may take three seconds per case."""
    from gpu_parts.parent import Run
    from gpu_parts.summary import write

    def started(*wanted: int, serve: Callable[..., None] = toy, budget: float = 90) -> Any:
        made = Run(tmp_path, budget, 3.0, {"dry": True}, ("fork",), serve)
        made.run(list(wanted), lambda run: write(run, tmp_path))
        made.printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return made

    yield started


def test_cases_that_die_or_hang_cost_themselves_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    made = run(1, 3)
    first = {r["case"]: (r["status"], r.get("why")) for r in made.rows if r["part"] == 1}
    assert first == {
        "good": ("ok", "crooked"), "dies": ("failed", "the process died (status 3)"),
        "hangs": ("failed", "no end in 3 s, killed"), "wrong": ("wrong", "crooked"), "last": ("ok", "crooked"),
    }  # fmt: skip
    assert made.rows[-1]["case"] == "endless" and made.rows[-1]["status"] == "failed"
    assert made.rows[-2]["case"] == "after ['family dies', 'family hangs', 'family wrong']"
    assert made.printed == made.rows == json.loads((tmp_path / "gpu.json").read_text())["rows"]
    page = (tmp_path / "gpu.md").read_text()
    assert "- part 1, hangs: no end in 3 s, killed" in page and "| not measured |" in page


def test_the_budget_ends_it(run: Callable[..., Any], tmp_path: Path) -> None:
    from gpu_parts.plan import PARTS

    made = run(1, 3, budget=2.5)
    assert made.parts[1]["limit_s"] <= 0.1 + 2.5 * PARTS[1].limit / (PARTS[1].limit + PARTS[3].limit)
    missing = [r for r in made.rows if r["status"] == "missing"]
    over = ("the part's time was over", "the budget was used up")
    assert missing and all(r["why"].startswith(over) and r["missing"] for r in missing)
    left = {name for r in missing for name in r["missing"]}
    assert left and left.isdisjoint(r["case"] for r in made.rows if r["status"] == "ok")
    assert "## Not run" in (tmp_path / "gpu.md").read_text()


def test_a_card_that_does_not_answer_is_reported(run: Callable[..., Any], tmp_path: Path) -> None:
    made = run(1, serve=broken)
    assert [(r["status"], r["why"]) for r in made.rows] == [("failed", "RuntimeError: no card")]
    assert "RuntimeError: no card" in (tmp_path / "gpu.md").read_text()


def test_bars(parts: None) -> None:
    from gpu_parts.summary import bars

    ok = {"status": "ok", "card": "a card", "case": "a case"}
    rows = [
        {**ok, "part": 3, "length": "128k", "shape": "prefill causal", "backend": "dense flash", "tflops": 560.0},
        {**ok, "part": 3, "length": "32k", "shape": "prefill causal", "backend": "dense flash", "tflops": 900.0},
        {**ok, "part": 4, "length": "128k", "phase": "prefill", "density": 0.12, "ratio": 2.1},
        {**ok, "part": 4, "length": "128k", "phase": "prefill", "density": 0.05, "status": "wrong", "ratio": 9.0},
        {**ok, "part": 4, "length": "128k", "phase": "prefill", "density": 0.3, "ratio": 9.0},
        {**ok, "part": 5, "length": "8k", "patch": "dense", "tpot_ratio": 0.99},
        {**ok, "part": 5, "length": "8k", "patch": "quest", "tpot_ratio": 0.98},
    ]
    found = [(b["state"], b.get("value")) for b in bars(rows, dry=False)]
    assert found == [("pass", 560.0), ("not", 2.1), ("not measured", None), ("pass", 0.98), ("not measured", None)]
    assert {b["state"] for b in bars(rows, dry=True)} == {"dry run", "not measured"}


def test_waits_counted_on_a_cpu_are_read(parts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gpu_parts import models

    head = "| method | executor | prefill | chunk | first step | later steps |\n|---|---|---|---|---|---|\n"
    page = tmp_path / "counts.md"
    page.write_text(
        f"# Counts\n\n12 / 3\n\n## One prompt\n\n{head}| quest | triton | 9 / 0 | 9 1 9 / 0 3 0 | 66 / 2 | 60 / 2 |\n"
        f"\n## Two padded prompts\n\n{head}| dhsa | triton | 1 / 1 | 1 / 1 | 1 / 1 | 1 / 1 |\n"
    )
    monkeypatch.setattr(models, "COUNTED", page)
    models.counted.cache_clear()
    assert models.counted() == {
        ("quest", "triton"): {"prefill": 0.0, "chunk": 1.0, "first step": 2.0, "later steps": 2.0}
    }
    models.counted.cache_clear()
