"""What every task is: a seeded generator of prompts with answers, and a score."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfpatch.text.needles import STYLES

from ..errors import EvaluationError
from .answers import holds, without_thoughts

PLACES = ("end", "both")
COMMON_OPTIONS: Mapping[str, Any] = {
    "haystack": "grammar", "depth": None, "question_place": "end", "needle": None, "chat": False,
}  # fmt: skip
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Sample:
    """One prompt, the answers to be found in what follows it, and how it goes on where all of them are given.

    `meta`: `task`, `length` (tokens of the prompt, special ones included), `requested`, `depth` of what is asked for
    (None where several facts are) and `depths` of all facts (0 start, 1 end of the haystack), `haystack`, `seed`,
    `index`, `question_place`, `question_at` (character at which the closing question begins) and
    `question_in_sparse_part`: True, as the question belongs to the prompt; a runner that feeds it apart says False.
    `shared`: characters in front that samples which are asked together have in common.
    """

    prompt: str
    answers: list[str]
    meta: dict[str, Any] = field(default_factory=dict)
    continuation: str = ""
    shared: int = 0

    @property
    def value(self) -> str:
        """The first answer."""
        return self.answers[0]

    @property
    def tokens(self) -> int | None:
        """Tokens of the prompt, special ones included, where that was counted."""
        return self.meta.get("length")


class Task(ABC):
    """A generator of samples and their score.

    `max_new_tokens` suffices for the answer even with one token per byte; an answer ends at a string of `stop`.
    `options` are the settings `samples` takes, with their defaults; COMMON_OPTIONS go with every task: `needle` is a
    style of `hfpatch.text.needles` (None: what the model knows), `chat` puts the prompt through the chat template
    (None: where there is one).
    """

    def __init__(
        self,
        name: str,
        summary: str,
        options: Mapping[str, Any],
        max_new_tokens: int,
        stop: tuple[str, ...] = ("\n",),
    ) -> None:
        self.name, self.summary, self.max_new_tokens, self.stop = name, summary, max_new_tokens, stop
        self.options = {**COMMON_OPTIONS, **options}

    def samples(
        self, tokenizer: PreTrainedTokenizerBase, length: int, n: int, seed: int = 0, **options: Any
    ) -> list[Sample]:
        """`n` prompts of at most `length` tokens; sample `i` depends on `seed` and `i` alone.

        Raises EvaluationError.
        """
        chosen = self._checked(options)
        try:
            return [self._sample(tokenizer, length, seed, index, chosen) for index in range(n)]
        except EvaluationError as error:
            raise EvaluationError(f"{self.name}: {error}") from error

    def score(self, text: str, sample: Sample) -> float:
        """Share of the sample's answers that the generated text gives before its first stop string, in [0, 1]."""
        return recall(clip(without_thoughts(text), self.stop), sample.answers)

    @abstractmethod
    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, index: int, options: dict[str, Any]
    ) -> Sample: ...

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise EvaluationError(
                f"{self.name}: there is no option {unknown[0]!r}; options are {', '.join(sorted(self.options))}."
            )
        chosen = {**self.options, **options}
        depth, place = chosen["depth"], chosen["question_place"]
        if depth is not None and not (isinstance(depth, int | float) and 0 <= depth <= 1):
            raise EvaluationError(f"{self.name}: depth={depth!r} is not between 0 (start) and 1 (end).")
        if place not in PLACES:
            raise EvaluationError(f"{self.name}: question_place={place!r} is not one of {', '.join(PLACES)}.")
        needle, chat = chosen["needle"], chosen["chat"]
        if needle is not None and needle not in STYLES:
            raise EvaluationError(f"{self.name}: needle={needle!r} is not one of {', '.join(STYLES)}.")
        if chat is not None and not isinstance(chat, bool):
            raise EvaluationError(f"{self.name}: chat={chat!r} is neither true, false nor null.")
        return chosen

    def rng(self, seed: int, index: int, part: str = "facts") -> random.Random:
        """The generator of one part of sample `index`."""
        return random.Random(f"{self.name}/{part}/{seed}/{index}")


def even_depth(seed: int, index: int) -> float:
    """Depth in [0, 1) of sample `index`: any number of them covers the range evenly."""
    return (random.Random(f"depth/{seed}").random() + index * _GOLDEN) % 1


def clip(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string, leading blanks aside."""
    text = text.lstrip()
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def recall(text: str, answers: Sequence[str]) -> float:
    """Share of `answers` that stand in `text`, as `answers.holds` says."""
    return sum(holds(text, a) for a in answers) / len(answers) if answers else 0.0
