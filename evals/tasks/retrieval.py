"""Tasks that ask for facts: hidden in a haystack, or so many of them that they fill the prompt."""

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfpatch.text import grammar
from hfpatch.text.needles import styled
from hfpatch.text.sources import sentences

from ..errors import EvaluationError
from .base import Sample, Task, even_depth
from .frame import Frame, frame_of, style_of
from .layout import Layout, compose

_NUMBER = re.compile(r"\d{5,}")
_LEAD = re.compile(r" (?:Answer|Result):| (?:Topic|Sentiment|Subject):")
MOST = 2000
Build = Callable[..., grammar.Task]


class FactTask(Task):
    """`build(rng, **options)` makes the facts and the question.

    `grow` names the option that counts facts; where it is None there are as many as fit, without a haystack. `ordered`
    facts stay in order at random depths; otherwise the one asked for gets the depth wanted.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        build: Build,
        options: Mapping[str, Any],
        max_new_tokens: int,
        *,
        grow: str | None = None,
        least: int = 1,
        ordered: bool = False,
        stop: tuple[str, ...] = ("\n",),
    ) -> None:
        super().__init__(name, summary, options, max_new_tokens, stop)
        self._build, self._own = build, tuple(options)
        self._grow, self._least, self._ordered = grow, least, ordered

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, index: int, options: dict[str, Any]
    ) -> Sample:
        depth = even_depth(seed, index) if options["depth"] is None else float(options["depth"])
        own = {name: options[name] for name in self._own}
        frame, style = frame_of(tokenizer, options["chat"]), style_of(tokenizer, options["needle"])
        if self._grow and own[self._grow] is None:

            def attempt(count: int) -> tuple[Layout, grammar.Task]:
                task = self._made(seed, index, {**own, str(self._grow): count}, style)
                if task.spread:
                    task = _moved(task, round(depth * (len(task.facts) - 1)))
                head, tail = _question(task, options["question_place"], frame)
                depths = [0.0] * len(task.facts)
                return compose(tokenizer, task.facts, depths, None, 1 << 40, head, tail, lead=frame.before), task

            found, task = self._grown(length, attempt)
            haystack = "none"
        else:
            task = self._made(seed, index, own, style)
            depths = self._depths(task, depth, self.rng(seed, index, "depths"), options["depth"] is not None)
            head, tail = _question(task, options["question_place"], frame)
            haystack = str(options["haystack"])
            source = sentences(haystack, self.rng(seed, index, "haystack"))
            drawn = [n for n in range(len(task.facts)) if task.spread and (self._ordered or n != task.target)]
            found = compose(tokenizer, task.facts, depths, source, length, head, tail, drawn, frame.before)
        answer = task.turns[0][1]
        together = haystack == "none" and not task.spread
        known = None if self._ordered or together else found.depths[task.target]
        meta = {
            "task": self.name, "length": found.tokens, "requested": length, "depth": known,
            "depths": found.depths, "haystack": haystack, "seed": seed, "index": index,
            "question_place": options["question_place"], "question_at": found.question_at,
            "question_in_sparse_part": True,
        }  # fmt: skip
        return Sample(found.prompt, _answers(answer), meta, answer.rstrip(".;"))

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        chosen = super()._checked(options)
        for name in self._own:
            value, growing = chosen[name], name == self._grow
            if growing and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
                more = " or None for as many as fit" if growing else ""
                raise EvaluationError(f"{self.name}: {name}={value!r} is not a number from 0 to {MOST}{more}.")
        return chosen

    def _made(self, seed: int, index: int, own: dict[str, Any], style: str) -> grammar.Task:
        try:
            return styled(self._build(self.rng(seed, index), **own), style, self.rng(seed, index, "style"))
        except (TypeError, ValueError, IndexError) as error:
            raise EvaluationError(f"it cannot be made with {own} ({error}); use the defaults.") from error

    def _depths(self, task: grammar.Task, depth: float, rng: random.Random, asked: bool) -> list[float]:
        if not task.spread:
            return [depth] * len(task.facts)
        depths = [rng.random() for _ in task.facts]
        if self._ordered:
            if asked:
                raise EvaluationError("its facts are spread at random; leave out `depth`.")
            return sorted(depths)
        depths[task.target] = depth
        return depths

    def _grown(
        self, length: int, attempt: Callable[[int], tuple[Layout, grammar.Task]]
    ) -> tuple[Layout, grammar.Task]:
        """As many facts as fit into `length` tokens; `attempt` lays out so many."""
        low, best = self._least, attempt(self._least)
        if best[0].tokens > length:
            raise EvaluationError(
                f"{length} tokens are too few: the shortest prompt takes {best[0].tokens}; raise the length."
            )
        per_fact = max(best[0].tokens / max(len(best[1].facts), 1), 1.0)
        high = max(low + 1, length + 1)
        while high - low > 1:
            guess = low + int((length - best[0].tokens) / per_fact * 0.98)
            middle = min(max(guess, low + 1), high - 1)
            tried = attempt(middle)
            if tried[0].tokens <= length:
                per_fact = max((tried[0].tokens - best[0].tokens) / (middle - low), 0.5)
                low, best = middle, tried
            else:
                high = middle
                per_fact = max((tried[0].tokens - best[0].tokens) / (middle - low), 0.5)
        return best


def _moved(task: grammar.Task, place: int) -> grammar.Task:
    facts = [*task.facts]
    facts.insert(place, facts.pop(task.target))
    return grammar.Task(facts, task.turns, place, task.spread)


def _question(task: grammar.Task, place: str, frame: Frame) -> tuple[str, str]:
    """What stands before and after the haystack."""
    turn = task.turns[0][0]
    return (_LEAD.split(turn)[0] if place == "both" else ""), frame.tail(turn)


def _answers(expected: str) -> list[str]:
    """The numbers of an expected continuation or, where there are none, its comma-separated words."""
    numbers = list(dict.fromkeys(_NUMBER.findall(expected)))
    return numbers or [word.strip() for word in expected.strip(" .;").split(",")]
