"""A model's answers under settings of `zerotuning`, each asked once, those of an interrupted search not again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..api import patched
from ..methods.zerotuning import ZeroTuningConfig
from .classification import Answers, Questions
from .unfinished import Part, Unfinished, model_mark

EXAMPLES = "examples"  # the questions that are searched
Setting = tuple[float, tuple[int, ...]]


class Asked:
    """Answers to sets of questions by factor and heads; called with these it asks, or tells what it was told.

    `total` is the most there is to ask of all sets, `advance` is called once for each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        questions: Mapping[str, Questions],
        layers: int | str | list[int] | None,
        run: dict[str, Any],
        total: int,
        out: str | Path | None = None,
        advance: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.questions, self.layers, self.advance = model, questions, layers, advance or (lambda: None)
        marks = {
            "calibration": "zerotuning",
            "model": model_mark(model),
            **{n: q.mark() for n, q in questions.items()},
        }
        self.kept = Unfinished(out, {**run, **marks}, "settings", total)
        self.done: dict[tuple[str, Setting], Answers] = {}
        self.steps = 0

    def part(self) -> Part:
        """All answers so far."""
        tensors = {f"{n}.{name}": t for n, a in enumerate(self.done.values()) for name, t in vars(a).items()}
        return {"settings": [[of, gamma, list(heads)] for of, (gamma, heads) in self.done]}, tensors

    def resume(self) -> None:
        """Take over the answers of an interrupted search. Raises ConfigError."""
        part = self.kept.load()
        if part is None:
            return
        with self.kept.fitting():
            if len(part[0]["settings"]) != self.kept.done:
                raise ValueError("other settings")
            for n, (of, gamma, heads) in enumerate(part[0]["settings"]):
                count, labels = len(self.questions[of]), len(self.questions[of].names)
                sizes = {"token": (count,), "labels": (count, labels), "entropy": (count,)}
                own = {name: part[1][f"{n}.{name}"].reshape(size) for name, size in sizes.items()}
                self.done[of, (float(gamma), tuple(map(int, heads)))] = Answers(**own)
                self.step()

    def step(self, upto: int | None = None) -> None:
        """Advance by one, or to so many."""
        for _ in range(1 if upto is None else upto - self.steps):
            self.steps += 1
            self.advance()

    def __call__(self, gamma: float = 1.0, heads: Sequence[int] = (), of: str = EXAMPLES) -> Answers:
        setting: Setting = (1.0, ()) if gamma == 1 or not heads else (gamma, tuple(sorted(heads)))
        key, questions = (of, setting), self.questions[of]
        if key not in self.done:
            if setting[1]:
                with patched(self.model, ZeroTuningConfig(gamma=gamma, heads=list(setting[1]), layers=self.layers)):
                    answers = questions.ask(self.model)
            else:
                answers = questions.ask(self.model)
            with self.kept.step():
                self.done[key] = answers
            self.step()
        return self.done[key]

    def settings(self, of: str = EXAMPLES) -> dict[Setting, Answers]:
        """The answers so far to one set."""
        return {setting: a for (which, setting), a in self.done.items() if which == of}
