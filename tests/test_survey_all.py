"""Every model type of the installed Transformers, each in a process of its own."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import transformers
from survey import page
from survey.build import CAUSAL, VISION
from survey.judge import judge
from survey.pool import run_all, run_one
from survey.verdict import NOT_BUILT, WRONG, Verdict

pytestmark = pytest.mark.slow


def test_every_type_is_what_the_page_says() -> None:
    same = page.release() == ".".join(transformers.__version__.split(".")[:2])
    listed = page.known() if same else {}
    changed, wrong = [], []
    for name, result in run_all(judge, [*CAUSAL, *VISION], os.cpu_count() or 2):
        verdict = result if isinstance(result, Verdict) else Verdict(name, reason=result)
        was, now = listed.get(name, ("", "", "")), page.cells(verdict)
        wrong += [name] * (verdict.verdict == WRONG)
        excused = was[0] == NOT_BUILT and verdict.verdict != WRONG  # a library is here that was not there
        if (was[:2] != now[:2] and not excused) if was[0] else verdict.verdict == WRONG:
            changed.append(f"{name} was {' '.join(was[:2]) or 'unknown'}, is {' '.join(now)}")
    assert not changed, "docs/models.md says otherwise (`make models` writes it anew):\n" + "\n".join(changed)
    if wrong:
        pytest.xfail(f"wrong, as docs/models.md says: {', '.join(sorted(wrong))}")


@pytest.mark.parametrize(
    "task,name,words",
    [
        (os._exit, 3, "its process ended with code 3"),
        (time.sleep, 60, "no result within 2 seconds"),
        (bytearray, 1 << 40, "its process ended with code 1"),
        (str.upper, "llama", "LLAMA"),
    ],
)
def test_a_process_that_ends_hangs_or_grows_is_told(task: Any, name: Any, words: str) -> None:
    run_one(len, "warm up")
    assert run_one(task, name, timeout=2 if task is time.sleep else 60) == words
