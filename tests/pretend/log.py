"""What is counted of the calls of patched layers: operations, waits for the GPU, faults."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Of one layer call: operations that launch something, waits and faults by the line of hfpatch they come from."""

    layer: int = -1
    ops: int = 0
    names: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def op(self, name: str) -> None:
        """Count one operation."""
        self.ops += 1
        self.names[name] += 1

    def wait(self, what: str) -> None:
        """Count one place where the CPU waits for the GPU."""
        self.waits[f"{place()} {what}"] += 1

    def fault(self, what: str) -> None:
        """Count what a GPU would raise, or what would go wrong there."""
        self.faults[f"{place()} {what}"] += 1


class Log:
    """The counts of layer calls in order, and of all that happened between them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.calls: list[Counts] = []
        self.outside = Counts()
        self._open: list[Counts] = []

    @property
    def now(self) -> Counts:
        """Where to count."""
        return self._open[-1] if self._open else self.outside

    def enter(self, layer: int) -> None:
        """A layer call begins."""
        counts = Counts(layer)
        self.calls.append(counts)
        self._open.append(counts)

    def leave(self) -> None:
        """It ends."""
        self._open.pop()


def place() -> str:
    """The innermost line of hfpatch on the stack, else of Transformers."""
    frame, other = sys._getframe(1), None
    while frame is not None:
        file = frame.f_code.co_filename
        if "/hfpatch/" in file:
            return f"hfpatch/{file.rsplit('/hfpatch/', 1)[1]}:{frame.f_lineno}"
        if other is None and "/transformers/" in file:
            other = f"transformers/{file.rsplit('/transformers/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "?"


log = Log()
