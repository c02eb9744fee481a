"""Part 1: every executor against float64 on every problem, and the tests of the executors."""

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch

from gpu_parts.context import Context
from gpu_parts.exact import exact, family, judge, sampled
from gpu_parts.plan import FAILED, OK, ROOT, SKIPPED, Case, Row
from gpu_parts.problems import LONG, TESTED, Spec, specs
from hfpatch.ops import list_executors

SAMPLED = 64
QUICK = "merge_of or by_hand"  # the tests of a dry run


def executors() -> list[str]:
    """Every executor but the definition; what runs by default last."""
    names = [e.name for e in list_executors() if e.name != "reference"]
    return sorted(names, key=lambda name: (name == "torch", name != "triton", name))


def cases(context: Context) -> list[Case]:
    """A case per problem and executor, then one per file of tests; what PyTorch has to compile for long goes last.

    The long problems are all in one group: two of them at once may not fit the card.
    """
    found, last = [], []
    for n, spec in enumerate(specs(context)):
        alike, group = spec.alike(), 0 if spec.lk == LONG else n
        for name in executors():
            run = partial(_compare, context, spec, name)
            case = Case(f"{spec.name}: {name}", run, family(alike, name, spec.lies), group)
            (last if name == "flex" else found).append(case)
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    if context.dry:
        files = [f for f in files if f.name == "test_executors.py"]
    tests = []
    for n, file in enumerate(files, 1):
        tests.append(Case(f"tests/ops/{file.name}", partial(_tests, context, str(file)), group=n, limit=600))
    return [*found, *tests, *last]


@lru_cache(maxsize=1)
def _problem(context: Context, spec: Spec) -> tuple[Any, ...]:
    problem = spec.make(context.device.torch)
    rows = sampled(problem, SAMPLED) if spec.lq > TESTED else None
    return problem, rows, exact(problem, rows)


def _compare(context: Context, spec: Spec, executor: str) -> Iterator[Row]:
    problem, rows, truth = _problem(context, spec)
    row = judge(problem, executor, truth, rows)
    context.device.wait()
    yield {"executor": executor, **row}


class _Counting:
    """What pytest says of each test."""

    def __init__(self) -> None:
        self.passed, self.skipped, self.failed = 0, 0, list[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test."""
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed += 1
        elif report.skipped:
            self.skipped += 1


def _tests(context: Context, file: str) -> Iterator[Row]:
    try:
        import pytest
    except ImportError:
        yield {"status": SKIPPED, "why": "pytest is not installed"}
        return
    counting = _Counting()
    words = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), file]
    with torch.enable_grad():
        status = pytest.main([*words, *(["-k", QUICK] if context.dry else [])], plugins=[counting])
    right = status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    row: Row = {"status": OK if right else FAILED, "passed": counting.passed, "skipped": counting.skipped}
    if not right:
        row["why"] = f"pytest ended with {int(status)}; failed: {', '.join(counting.failed[:20]) or 'none'}"
    yield row
