"""How a prompt is put to a model: as a text to continue, or as the user's turn of a chat."""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from hfpatch.text.prompt_ids import special_around

from ..errors import EvaluationError
from ..testbed import CHECKPOINT

_MARK = "HFPATCH-TURN"
_LEAD = re.compile(r" (?:(?:Answer|Result):|(?=(?:Topic|Sentiment|Subject):)) ?")
INTRODUCTION = "Read this text.\n\n"


@dataclass(frozen=True)
class Frame:
    """What stands before the user's text and between it and the beginning of the answer; nothing without a chat."""

    before: str = ""
    after: str | None = None

    def tail(self, turn: str) -> str:
        """The end of a prompt, from the question on: in a chat the answer begins in the assistant's turn."""
        if self.after is None:
            return turn
        question, begun = self.parts(turn)
        return "\n" + question + self.after + begun

    def parts(self, turn: str) -> tuple[str, str]:
        """What is asked, and what the answer begins with: all and nothing without a chat."""
        if self.after is None:
            return turn, ""
        question, *begun = _LEAD.split(turn, maxsplit=1)
        return question.removeprefix("Question: "), "".join(begun)


PLAIN = Frame()


def frame_of(tokenizer: Any, chat: bool | None) -> Frame:
    """The frame of the tokenizer's chat template; `chat` None: where it has one. Raises EvaluationError.

    The framed text is a prompt like any other: what the tokenizer puts in front of every text is left out of it.
    """
    if chat is False or (chat is None and not getattr(tokenizer, "chat_template", None)):
        return PLAIN
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("The tokenizer has no chat template; ask for plain prompts (chat: false, --plain).")
    messages = [{"role": "user", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template may raise anything
        raise EvaluationError(
            f"The chat template cannot be used ({error!s:.200}); ask for plain prompts (--plain)."
        ) from error
    before, found, after = text.partition(_MARK)
    if not found:
        raise EvaluationError("The chat template leaves out what the user says; ask for plain prompts (--plain).")
    if after.rstrip().endswith("<think>"):
        after += "\n</think>\n\n"
    front, _ = special_around(tokenizer)
    if front:
        before = before.removeprefix(tokenizer.decode(front))
    return Frame(before + INTRODUCTION, after)


def style_of(tokenizer: Any, needle: str | None) -> str:
    """How needles are said: as asked for, or in words that all models know unless this is the embedded model."""
    if needle is not None:
        return needle
    known = _embedded_words()
    return "grammar" if len(tokenizer) == len(known) and tokenizer.get_vocab() == known else "words"


@cache
def _embedded_words() -> dict[str, int]:
    return json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
