"""An executor that a rule wants proven is given a small problem of the kind first, once; a wrong one is left aside."""

import pytest
import torch
from helpers import inputs, layout_of, random_map, selections

from hfpatch.core.selection import BlockMap, Causal, Rows, SinkWindow
from hfpatch.ops import Executor, Rule, attend, executors, reference, register_executor, self_check
from hfpatch.ops.call import Problem

KINDS = [
    "window",
    "blocks_even",
    "blocks_shared",
    "blocks_per_head",
    "tokens",
    Rows([(9, SinkWindow(1, 5)), (63, Causal())]),
]


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(executors, "TABLE", list(executors.TABLE))
    monkeypatch.setattr(executors, "_EXECUTORS", dict(executors._EXECUTORS))
    monkeypatch.setattr(self_check, "_FOUND", {})


def add(run):
    """Put an executor that has to be proven before all others; the problems it was given are returned."""
    given = []

    def spied(problem):
        given.append(problem)
        return run(problem)

    register_executor(Executor("new", lambda p: None, spied), Rule("new", kinds=executors.LISTS, proven=True))
    return given


def ran(selection, lq=63, lk=63, dtype=torch.float32, **kw):
    q, k, v = inputs(1, 4, 2, lq, lk, dtype=dtype)
    chosen = selections(layout_of(q, k))[selection] if isinstance(selection, str) else selection
    return attend(q, k, v, selection=chosen, scale=0.1, **kw).executor


def nothing(problem):
    out, lse = reference.run(problem)
    return out * 0, lse


def not_numbers(problem):
    out, lse = reference.run(problem)
    return out, lse.masked_fill(torch.rand_like(lse) < 0.01, torch.nan)


def crooked(problem):
    out, lse = reference.run(problem)
    return out * 1.03, lse


def broken(problem):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("lq", [1, 20, 63])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_runs_and_was_looked_at_in_small(kind, lq):
    given = add(reference.run)
    assert ran(kind, lq) == ran(kind, lq) == "new"
    small, *own = given
    assert len(own) == 2 and small.at.Lk == self_check.KEYS and (small.at.Lq == 1) == (lq == 1)


@pytest.mark.parametrize("run, says", [
    (nothing, "output of a small problem is wrong by 1.0e"), (not_numbers, "lse of a small problem has NaN"),
    (crooked, "output of a small problem is wrong by 3"), (broken, "ended with RuntimeError: no such instruction"),
])  # fmt: skip
def test_what_is_wrong_is_left_aside_with_a_word(run, says):
    given = add(run)
    with pytest.warns(UserWarning, match=f"Executor 'new' is left aside for some calls: .*{says}"):
        assert ran("window") == "torch"
    assert ran("window") == "torch" and len(given) == 1


def test_every_kind_is_looked_at_by_itself():
    given = add(reference.run)
    ran("window")
    before = len(given)
    for change in (
        {"selection": "tokens"}, {"lq": 1}, {"dtype": torch.bfloat16}, {"softcap": 3.0}, {"sinks": torch.zeros(4)},
        {"bias": torch.zeros(1, 1, 63)},
    ):  # fmt: skip
        ran(**{"selection": "window", **change})
        before += 2
        assert len(given) == before
    ran("window", 40)
    ran("window", 63, softcap=5.0)
    assert len(given) == before + 2


@pytest.mark.parametrize("kind", ["window", "tokens"])
def test_a_default_device_and_other_dtypes_are_no_trouble(kind):
    given = add(reference.run)
    q, k, v = inputs(1, 4, 2, 63, 63, dtype=torch.float64)
    chosen = selections(layout_of(q, k))[kind]
    with torch.device("meta"):
        assert executors.choose(Problem(q, k, v, chosen, 0.1)).name == "new"
    assert given[0].q.dtype == torch.float64 and given[0].q.device.type == "cpu"


def test_what_is_named_is_not_looked_at():
    given = add(reference.run)
    assert ran("window", executor="new") == "new" and len(given) == 1


def test_the_small_problem_has_the_kind_of_the_large_one():
    q, k, v = inputs(1, 8, 4, 300, 400, d=48, dv=16, dtype=torch.bfloat16)
    at = layout_of(q, k)
    parts = Rows([(200, random_map(at.rows(0, 200), 4, 100, 7, 3)), (250, SinkWindow(3, 9)), (300, Causal())])
    small = self_check._small(Problem(q, k, v, parts, 0.1, None, None, torch.zeros(1, 1, 400)))
    (_, blocks), (_, window), (_, rest) = small.selection.parts
    assert isinstance(blocks, BlockMap) and (blocks.block_q, blocks.block_k) == (100, 7)
    assert blocks.indices.shape[:3] == (2, 2, 1)
    assert window == SinkWindow(4, 50) and isinstance(rest, Causal)
    assert small.q.shape == (2, 4, 129, 48) and small.v.shape == (2, 2, 257, 16) and small.q.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["window", "tokens"])
def test_triton_is_proven_by_it(kind, dtype, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")
    monkeypatch.setattr(executors, "TABLE", [Rule("triton", kinds=executors.LISTS, proven=True), Rule("torch")])
    assert ran(kind, 1, dtype=dtype) == "triton"
