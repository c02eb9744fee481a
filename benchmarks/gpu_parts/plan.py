"""The parts by number, and what the processes of a run tell each other. Imports nothing but the standard library."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
OK, WRONG, SKIPPED, FAILED, MISSING = "ok", "wrong", "skipped", "failed", "missing"


@dataclass(frozen=True)
class Part:
    """A part: its module, its share of the budget in seconds, and how many processes may work on it at once."""

    module: str
    limit: float
    lanes: int
    about: str


PARTS = {
    0: Part("card", 30, 13, "versions and card, copy and product, Triton's variants compiled meanwhile"),
    1: Part("right", 90, 4, "every executor against float64"),
    2: Part("models", 60, 4, "every method on tiny models: GPU against CPU, waits for the GPU, undo"),
    3: Part("kernels", 100, 1, "attention kernels against the fastest dense one"),
    4: Part("choosing", 80, 1, "methods of one layer: select, attend and report apart"),
    5: Part("whole", 80, 1, "an 8-layer model of an 8B shape: TTFT and TPOT"),
    6: Part("tiles", 40, 1, "tile sizes of the Triton kernel"),
}


@dataclass(frozen=True)
class Case:
    """Something that is run by itself: if it hangs or dies, the others of its part go on without it.

    `family` says what was right or wrong if it is a check (see `exact.family`). Cases of one `group` run in one
    process one after the other; `limit` is its time-out where it needs more than the others.
    """

    name: str
    run: Callable[[], Iterator[Row]]
    family: str = ""
    group: int = 0
    limit: float | None = None


@dataclass(frozen=True)
class Options:
    """What a process of a part is told."""

    dry: bool
    log: str
    extra: tuple[str, ...] = ()
    failed: frozenset[str] = frozenset()
    done: frozenset[str] = field(default_factory=frozenset)


def first_line(error: BaseException) -> str:
    """The error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"
