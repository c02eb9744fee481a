"""Operations and waits for the GPU of every method: no more than the table says, on tensors that pretend."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from methods_list import ALWAYS, METHODS, MethodCase

pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")

from pretend import page
from pretend.counting import EXECUTORS, PHASES, WAYS, count
from pretend.modes import pretending
from pretend.tensors import OnGpu, log

from hfpatch.ops import self_check
from hfpatch.runtime.padding import length_with_groups, row_groups

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing needs to be pretended")

TABLE = page.read()


def marks(way: str, case: MethodCase, executor: str) -> tuple[pytest.MarkDecorator, ...]:
    """By default one prompt, each method once by the fused kernel, a few by both executors."""
    first = "dhsa-queries" if case.name == "dhsa" else case.name
    quick = case.name in ALWAYS if executor == "torch" else str(case) == first
    return () if way == WAYS[0] and quick and not (executor == "torch" and case.label) else (pytest.mark.slow,)


ALL = [
    pytest.param(way, case, executor, id=f"{way}-{case}-{executor}", marks=marks(way, case, executor))
    for way in WAYS
    for case in METHODS
    for executor in EXECUTORS
]


@pytest.mark.parametrize("way,case,executor", ALL)
def test_no_more_than_the_table_says(way: str, case: MethodCase, executor: str) -> None:
    counted = count(case, executor, way)
    calls = [c for phase in PHASES for c in counted.calls[phase]]
    faults = sum((c.faults for c in [*calls, counted.outside]), Counter[str]())
    assert calls and not faults
    assert counted.error < 1e-5
    more = []
    for phase, cell in page.cells(counted).items():
        want, got = (page.parse(x, counted.layers) for x in (TABLE[way, str(case), executor][phase], cell))
        if any(g > w for gs, ws in zip(got, want, strict=True) for g, w in zip(gs, ws, strict=True)):
            waits = sum((c.waits for c in counted.calls[phase]), Counter[str]())
            more.append(f"{phase}: {cell}, {TABLE[way, str(case), executor][phase]} in the table; waits {dict(waits)}")
    assert not more, "`make counts` writes the table anew:\n" + "\n".join(more)


@pytest.mark.slow
def test_kernels_that_choose_serve_once_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody named an executor: small problems are looked at first, and not in later steps."""
    monkeypatch.setattr(self_check, "_FOUND", {})
    case = next(c for c in METHODS if str(c) == "dhsa-queries")
    table = page.parse(TABLE[WAYS[0], str(case), "triton"]["later steps"], 2)
    assert page.parse(page.cells(count(case, None))["later steps"], 2) == table
    assert self_check._FOUND and not any(self_check._FOUND.values())


def test_a_decode_step_s_length_and_mask_are_read_in_one_wait() -> None:
    keep = torch.zeros(3, 1, 1, 9, dtype=torch.bool)
    keep[..., :6] = True
    keep[1, ..., :2] = False
    for mask, n in ((keep, 1), (torch.ones(3, 1, 1, 9, dtype=torch.bool), 2)):  # keys beyond the length are cut off
        log.reset()
        with pretending():
            there = OnGpu(mask)
            total = length_with_groups(OnGpu(torch.tensor(6)), there, 3, 1)
            groups = row_groups(there, 3, 1, total)
        assert (total, groups) == (6, row_groups(mask, 3, 1, 6))
        assert log.outside.waits.total() == n


def waits(act) -> list[str]:
    """What of `act(x [2, 3] on the GPU, y [3] on the CPU)` waits, and its faults in capitals."""
    log.reset()
    with pretending():
        act(OnGpu(torch.ones(2, 3)), torch.ones(3))
    found = [what.rpartition(" ")[2] for what in log.outside.waits.elements()]
    return found + ["FAULT" for _ in log.outside.faults.elements()]


@pytest.mark.parametrize(
    "act,found",
    {
        "sum": (lambda x, y: (x + 1).sum(), []),
        "factory": (lambda x, y: x * torch.arange(3, device=x.device), []),
        "bool": (lambda x, y: bool(x.any()), ["item"]),
        "int": (lambda x, y: int(x[0, 0]), ["item"]),
        "tolist": (lambda x, y: x.tolist(), ["tolist"]),
        "nonzero": (lambda x, y: x.nonzero(), ["nonzero"]),
        "unique": (lambda x, y: x.unique(), ["_unique2"]),
        "where": (lambda x, y: x[torch.where(x > 0, 0, 1).long()[0]], []),
        "boolean index": (lambda x, y: x[x > 0], ["index"]),
        "list of rows": (lambda x, y: x[[0, 1]], ["GPU"]),
        "tensor of numbers": (lambda x, y: torch.tensor([1, 2], device=x.device), ["GPU"]),
        "to the CPU": (lambda x, y: x.cpu(), ["CPU"]),
        "to the GPU": (lambda x, y: y.to(x.device), ["GPU"]),
        "repeats": (lambda x, y: x[0].repeat_interleave(x[0].long()), ["repeat_interleave"]),
        "mixed": (lambda x, y: x + y, ["FAULT"]),
        "a number from the CPU": (lambda x, y: x + y[0], []),
    }.values(),
)  # fmt: skip
def test_what_counts_as_waiting(act, found: list[str]) -> None:
    assert waits(act) == found


def test_operations_are_launches_not_views() -> None:
    log.reset()
    with pretending():
        x = OnGpu(torch.ones(2, 3))
        x.transpose(0, 1)[1:].expand(4, 2, 2)
        x.new_empty(4)
        assert log.outside.ops == 0
        (x * 2).softmax(-1)
    assert log.outside.names == Counter({"mul": 1, "_softmax": 1})
