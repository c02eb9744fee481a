"""Prompts in parts, so that every sentence and the question have token spans of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...text.prompt_ids import special_around

_CONTEXT, _QUESTION = "\x02context\x02", "\x02question\x02"


@dataclass(frozen=True)
class Prompt:
    """Token ids before the context, between context and question, and from the question to the end."""

    head: list[int]
    middle: list[int]
    tail: list[int]

    @property
    def size(self) -> int:
        """Tokens without any context."""
        return len(self.head) + len(self.middle) + len(self.tail)

    def ids(self, context: Sequence[int]) -> list[int]:
        """The whole prompt."""
        return [*self.head, *context, *self.middle, *self.tail]


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` without special tokens. Raises InputError for text that is not valid Unicode."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
    except (TypeError, UnicodeEncodeError) as error:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError("The text holds lone surrogates; read files with errors='replace'.") from error
        raise


def make_prompt(tokenizer: Any, template: str, question: str, chat: bool | None, answer_prefix: str = "") -> Prompt:
    """Lay out the prompt for `question`; after it stands the beginning of the answer, in a chat the assistant's.

    Raises InputError when a chat template is asked for and missing.
    """
    text = template.replace("{context}", _CONTEXT).replace("{question}", _QUESTION)
    special: list[int] = []
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_chat:
        raise InputError("The tokenizer has no chat template; set chat=False or give the tokenizer one.")
    if has_chat and chat is not False:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if _CONTEXT not in text or _QUESTION not in text:
            raise InputError("The chat template drops part of the message; set chat=False.")
        if answer_prefix and text.rstrip().endswith("<think>"):
            text += "\n</think>\n\n"
    else:
        special, _ = special_around(tokenizer)
        text += " " if answer_prefix and not text[-1].isspace() else ""
    text += answer_prefix
    head, rest = text.split(_CONTEXT, 1)
    middle, tail = rest.split(_QUESTION, 1)
    return Prompt(
        special + tokenize(tokenizer, head), tokenize(tokenizer, middle), tokenize(tokenizer, question + tail)
    )


def left_padded(rows: list[list[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `position_ids`, each `[B, L]`, rows flush right."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
