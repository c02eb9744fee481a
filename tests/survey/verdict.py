"""What the survey says about a type."""

from __future__ import annotations

from dataclasses import dataclass, field

RIGHT, WRONG, REFUSED, NOT_BUILT = "right", "wrong", "refused", "not built"


@dataclass
class Verdict:
    """`right`, `wrong`, `refused` or `not built`, and why; `patched` of `layers` layers of the tiny model.

    kinds: what is particular about the attention. notes: what could not be compared, and why. errors: relative to the
    largest logit, by comparison. seconds: of computing.
    """

    name: str
    verdict: str = NOT_BUILT
    reason: str = ""
    patched: int = 0
    layers: int = 0
    kinds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def short(error: BaseException, length: int = 140) -> str:
    """An exception in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= length else text[: length - 3] + "..."
