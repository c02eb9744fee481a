"""A model's answers under settings of `zerotuning`, each asked once, those of an interrupted search not again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..api import patched
from ..methods.zerotuning import ZeroTuningConfig
from .classification import Answers, Questions
from .unfinished import Part, Unfinished, model_mark

Setting = tuple[float, tuple[int, ...]]


class Asked:
    """Answers to all questions by factor and heads; called with these it asks, or tells what it was told.

    `total` is the most there is to ask, `advance` is called once for each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        questions: Questions,
        layers: int | str | list[int] | None,
        run: dict[str, Any],
        total: int,
        out: str | Path | None = None,
        advance: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.questions, self.layers, self.advance = model, questions, layers, advance or (lambda: None)
        marks = {"calibration": "zerotuning", "model": model_mark(model), "examples": questions.mark()}
        self.kept = Unfinished(out, {**run, **marks}, "settings", total)
        self.done: dict[Setting, Answers] = {}
        self.steps = 0

    def part(self) -> Part:
        """All answers so far."""
        tensors = {f"{n}.{name}": t for n, a in enumerate(self.done.values()) for name, t in vars(a).items()}
        return {"settings": [[gamma, list(heads)] for gamma, heads in self.done]}, tensors

    def resume(self) -> None:
        """Take over the answers of an interrupted search. Raises ConfigError."""
        part = self.kept.load()
        if part is None:
            return
        count, labels = len(self.questions), len(self.questions.names)
        sizes = {"token": (count,), "labels": (count, labels), "entropy": (count,)}
        with self.kept.fitting():
            if len(part[0]["settings"]) != self.kept.done:
                raise ValueError("other settings")
            for n, (gamma, heads) in enumerate(part[0]["settings"]):
                own = {name: part[1][f"{n}.{name}"].reshape(size) for name, size in sizes.items()}
                self.done[float(gamma), tuple(map(int, heads))] = Answers(**own)
                self.step()

    def step(self, upto: int | None = None) -> None:
        """Advance by one, or to so many."""
        for _ in range(1 if upto is None else upto - self.steps):
            self.steps += 1
            self.advance()

    def __call__(self, gamma: float = 1.0, heads: Sequence[int] = ()) -> Answers:
        key: Setting = (1.0, ()) if gamma == 1 or not heads else (gamma, tuple(sorted(heads)))
        if key not in self.done:
            if key[1]:
                with patched(self.model, ZeroTuningConfig(gamma=gamma, heads=list(key[1]), layers=self.layers)):
                    answers = self.questions.ask(self.model)
            else:
                answers = self.questions.ask(self.model)
            with self.kept.step():
                self.done[key] = answers
            self.step()
        return self.done[key]
