"""The one list of methods every invariant runs over; a new method adds one line."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodCase:
    """A method with settings that make it sparse on tiny prompts, and settings at which it must equal dense.

    `causality` is what it declares at `settings`; `sliding` says that it acts on sliding-window layers too.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    keep_all: dict[str, Any] = field(default_factory=dict)
    causality: str = "yes"
    sliding: bool = False
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.name


METHODS = [
    MethodCase("dense", sliding=True),
    MethodCase("infiniretri"),
    MethodCase("streaming", {"sink": 2, "window": 8}, {"window": 1 << 20}),
    MethodCase(
        "streaming", {"sink": 2, "window": 8, "last_queries": 5}, {"window": 1 << 20}, "tile", label="tri-shape"
    ),
]
