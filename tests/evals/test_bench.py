"""Latency and memory: what is counted, in which order, and when nothing is reported."""

from dataclasses import replace

import pytest
import torch
from hfpatch.evals.errors import EvaluationError, ExecutorMismatchError
from hfpatch.evals.jobs import latency as bench
from hfpatch.evals.jobs import memory
from hfpatch.evals.jobs.latency import LatencyJob, break_evens
from hfpatch.evals.jobs.memory import MemoryJob
from hfpatch.evals.run import backends
from hfpatch.evals.run.cells import Cell, Session
from hfpatch.evals.run.correctness import check_variant
from hfpatch.evals.run.generation import generate_tokens, text_ids
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.run.stats import apart, break_even, break_even_text, interval, summarise
from hfpatch.evals.run.timing import Stopwatch, time_once
from hfpatch.evals.run.variants import parse_variants

from hfpatch.ops import executors


@pytest.fixture
def session(model, tokenizer):
    session = Session("tiny", parse_variants(["streaming"], {"window": 32}))
    session.loaded = Loaded("tiny", model, tokenizer)
    return session


def test_break_even_lies_between_the_lengths_around_it():
    found = break_even({1024: 0.5, 4096: 2.0, 16384: 4.0}, {1024, 4096, 16384})
    assert found == {"relation": "about", "length": 2048}
    assert "2,048" in break_even_text(found)


@pytest.mark.parametrize(
    ("speedups", "relation", "length"),
    [
        ({1024: 1.5, 4096: 2.0}, "at most", 1024),
        ({1024: 0.5, 4096: 0.9}, "above", 4096),
        ({1024: 1.5, 2048: 0.5, 4096: 2.0}, "about", 2896),
        ({1024: 1.5, 2048: 0.5}, "above", 2048),
    ],
)
def test_break_even_counts_only_what_lasts(speedups, relation, length):
    assert break_even(speedups, set(speedups)) == {"relation": relation, "length": length}


def test_break_even_takes_no_speed_up_from_noise():
    assert break_even({1024: 1.2, 4096: 1.3}, set()) == {"relation": "above", "length": 4096}
    assert break_even({1024: 1.2, 4096: 3.0}, {4096}) == {"relation": "after", "length": 1024}
    assert break_even({1024: 0.5, 4096: 2.0}, {4096}) == {"relation": "about", "length": 2048}


def test_one_is_faster_only_when_the_spreads_do_not_overlap():
    fast, slow, wide = ({"low": a, "high": b} for a, b in ((1.0, 1.2), (1.3, 1.4), (1.1, 2.0)))
    assert apart(fast, slow) and apart(slow, fast) and not apart(fast, wide) and not apart(slow, wide)


def test_spread_is_quartiles_from_four_runs_on():
    assert summarise([4, 1, 3, 2, 5]) == {
        "median": 3, "low": 2, "high": 4, "spread": "quartiles", "runs": [4, 1, 3, 2, 5],
    }  # fmt: skip
    assert summarise([3, 1, 2])["spread"] == "extremes"


@pytest.mark.parametrize(
    ("hits", "asked", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_intervals_are_wilson_s(hits, asked, low, high):
    assert interval(hits / asked, asked) == pytest.approx((low, high), abs=1e-4)


def test_intervals_of_what_is_no_share_hold_the_nearest_share():
    assert interval(1e99, 4) == interval(1, 4) and interval(-3, 10**99) == (0.0, pytest.approx(0.0))


def test_stopwatch_sees_the_prompt_and_every_token(session):
    watch = Stopwatch()
    out = generate_tokens(session.loaded, text_ids(session.loaded, 63), 5, watch)
    assert out.shape == (1, 68) and len(watch.times) == 6
    ttft, tpot = time_once(session.loaded, text_ids(session.loaded, 63), 4)
    assert ttft > 0 and tpot > 0


def test_runs_are_interleaved_reversed_and_rotated(session, monkeypatch):
    order = []

    def timed(loaded, ids, decode_tokens):
        patched = hasattr(loaded.model, "_hfpatch_patch")
        order.append("B" if patched else "A")
        return (1.0, 0.5) if patched else (2.0, 1.0)

    monkeypatch.setattr(bench, "time_once", timed)
    job = LatencyJob([63], decode_tokens=2, repeats=4)
    (cell,) = job.cells(session.variants)
    rows = job.rows({cell: job.run(cell, session).data})
    assert order[1:] == [*"ABBA", *"BAAB"]
    assert [(r["ttft_speedup"], r["tpot_speedup"], r["tokens_per_second"]) for r in rows] == [(1, 1, 1), (2, 2, 2)]
    assert {b["relation"] for b in break_evens(rows)} == {"at most"}


def test_density_and_executor_come_from_the_timed_run(session):
    job = LatencyJob([257], decode_tokens=4, repeats=1)
    (cell,) = job.cells(session.variants)
    dense, sparse = job.rows({cell: job.run(cell, session).data})
    assert dense["density_prefill"] == dense["density_decode"] == 1.0
    assert 0.1 < sparse["density_prefill"] < 0.5 and 0.1 < sparse["density_decode"] < 0.2
    assert sparse["executors"] == ["torch"] and sparse["fallbacks"] == {}
    assert sparse["check"]["calls"] > 0 and sparse["check"]["error"] <= sparse["check"]["tolerance"]


@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize("patch", ["streaming:sink=2,window=16", "zerotuning:gamma=2.0"])
def test_nothing_is_reported_when_the_executor_is_wrong(session, monkeypatch, where, patch):
    right = executors._EXECUTORS["torch"]

    def off(problem, out):
        return out * 1.01 if out is not None and (problem.at.Lq == 1) == (where == "decode") else out

    def run(problem):
        out, lse = right.run(problem)
        return off(problem, out), lse

    wrong = replace(right, run=run, run_out=lambda problem: off(problem, right.run_out(problem)))
    monkeypatch.setitem(executors._EXECUTORS, "torch", wrong)
    variant = parse_variants([patch])[1]
    with pytest.raises(ExecutorMismatchError, match="differs from the reference"):
        check_variant(session.loaded, variant, text_ids(session.loaded, 257))
    assert not executors._WATCHING


def test_peak_memory_grows_with_the_prompt(session):
    dense = session.variants[0]
    small, large = (memory._measure(session.loaded, dense, n, 2, 0) for n in (16, 4000))
    keys_and_values = 4000 * 2 * 2 * 2 * 8 * 4
    assert large["peak"] - small["peak"] > keys_and_values
    assert large["peak"] == max(large["peak_prefill"], large["peak_decode"])


@pytest.mark.slow
def test_memory_is_measured_in_a_child_process_with_the_patch(session, folder):
    session.model_name = folder
    job = MemoryJob([257], decode_tokens=2)
    done = {cell: job.run(cell, session).data for cell in job.cells(session.variants)}
    dense, sparse = job.rows(done)
    assert dense["how"].startswith("child process") and dense["ratio"] == 1.0 and sparse["peak"] > 0


def test_failing_child_is_one_sentence(session, monkeypatch):
    done = memory.subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nMemoryError: too much")
    monkeypatch.setattr(memory.subprocess, "run", lambda *a, **k: done)
    cell = MemoryJob([16]).cells(session.variants)[0]
    with pytest.raises(EvaluationError, match="could not be measured: MemoryError: too much"):
        MemoryJob([16]).run(cell, session)


def test_peak_is_split_at_the_first_token():
    readings = iter([700, 300])
    reader = memory.PeakReader("fake", lambda: next(readings), lambda: 100, lambda: None)
    watch = memory._PhasePeaks(reader)
    for _ in range(4):
        watch.put(torch.zeros(1))
    assert watch.prefill == 700 and reader.peak() == 300


def test_other_dense_backends_take_part_and_leave_no_trace(session, monkeypatch):
    model = session.loaded.model
    monkeypatch.setattr(
        backends, "BACKENDS", {"sdpa": lambda _: True, "eager": lambda _: True, "none": lambda _: False}
    )
    used = []
    monkeypatch.setattr(
        bench, "time_once", lambda loaded, ids, n: used.append(model.config._attn_implementation) or (2, 1)
    )
    rows = LatencyJob([64], decode_tokens=2, repeats=2).run(Cell("latency", "", 64), session).data["rows"]
    assert [r["variant"] for r in rows] == ["dense", "streaming:window=32", "dense, eager"]
    assert used.count("eager") == 3 and model.config._attn_implementation == "sdpa"
    assert {b["variant"] for b in break_evens([{"length": 64, **r} for r in rows])} == {
        "streaming:window=32",
        "dense, eager",
    }
    monkeypatch.setattr(backends, "BACKENDS", {"no_such_attention": lambda _: True})
    assert backends.other_backends(session.loaded) == [] and model.config._attn_implementation == "sdpa"
