"""docs/models.md: the table of verdicts, written and read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import transformers

from .build import CAUSAL
from .patterns import BUDGET, PAGE, SINK, WINDOW
from .verdict import NOT_BUILT, REFUSED, RIGHT, WRONG, Verdict

PATH = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<verdict>[a-z ]+) \| (?P<layers>[^|]*) \| (?P<reason>[^|]*) \|", re.M)
_MEANING = {
    RIGHT: "as the unpatched model under explicit masks, in every way of feeding it that the type supports",
    REFUSED: "`patch_model` raises and names the reason; nothing is touched",
    WRONG: "a difference, or a type that is accepted although it can never act",
    NOT_BUILT: "no tiny model of it could be made and run here",
}


def render(verdicts: Iterable[Verdict]) -> str:
    """The page."""
    ordered = sorted(verdicts, key=lambda v: v.name)
    parts = [_head(ordered)]
    for title, some in (
        ("Causal language models", [v for v in ordered if v.name in CAUSAL]),
        ("Image-text models, on text alone", [v for v in ordered if v.name not in CAUSAL]),
    ):
        if some:
            rows = "\n".join(map(_row, some))
            counts = ", ".join(f"{n} {word}" for word, n in _counts(some))
            parts.append(
                f"## {title}\n\n{counts}.\n\n| type | verdict | layers | why | notes |\n|---|---|---|---|---|\n{rows}"
            )
    return "\n\n".join(parts) + "\n"


def release() -> str | None:
    """The Transformers release of the page, if there is one."""
    found = re.search(r"Transformers (\d+\.\d+)", PATH.read_text()) if PATH.exists() else None
    return found[1] if found else None


def known() -> dict[str, tuple[str, str, str]]:
    """Verdict, layers and reason of each type on the page."""
    text = PATH.read_text() if PATH.exists() else ""
    return {m["name"]: (m["verdict"].strip(), m["layers"].strip(), m["reason"].strip()) for m in _ROW.finditer(text)}


def cells(verdict: Verdict) -> tuple[str, str, str]:
    """Verdict, layers and reason as the page has them."""
    layers = f"{verdict.patched} of {verdict.layers}" if verdict.layers else ""
    return verdict.verdict, layers, _cell(verdict.reason)


def _counts(verdicts: list[Verdict]) -> list[tuple[str, int]]:
    counted = Counter(v.verdict for v in verdicts)
    return [(word, counted[word]) for word in _MEANING if counted[word]]


def _head(verdicts: list[Verdict]) -> str:
    counts = "\n".join(f"| {word} | {n} | {_MEANING[word]} |" for word, n in _counts(verdicts))
    version = ".".join(transformers.__version__.split(".")[:2])
    wrong = ", ".join(f"`{v.name}`" for v in verdicts if v.verdict == WRONG)
    listed = f"\nWrong: {wrong}.\n" if wrong else ""
    streaming, quest = f"sink {SINK}, window {WINDOW}", f"pages of {PAGE}, {BUDGET} keys"
    return f"""# Model types

Every model type of Transformers {version} that generates text, built tiny from its own configuration with random
weights, patched and compared. Written by `make models`; not to be edited.

| verdict | types | |
|---|---|---|
{counts}
{listed}
Compared are logits in float32 of two prompts of 63 tokens, under `streaming` ({streaming}) and
`quest` ({quest}), in these ways: all at once without a cache; a prompt and single tokens after it;
several turns, each of several tokens after what is in the cache; a static cache; a left-padded batch, also against its
rows alone. What the unpatched model cannot do, or does not do alike, is left out and noted. `layers` are those of the
tiny model."""


def _row(verdict: Verdict) -> str:
    notes = "; ".join([*([", ".join(verdict.kinds)] if verdict.kinds else []), *verdict.notes])
    return f"| `{verdict.name}` | {' | '.join(cells(verdict))} | {_cell(notes)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
