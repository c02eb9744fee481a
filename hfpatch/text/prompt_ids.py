"""Token ids of text that is to be continued: without what some tokenizers put after every text."""

from collections.abc import Sequence
from typing import Any

PROBES = ("a", "0", "的", ".")


def special_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens the tokenizer puts before and after a text, both empty where it cannot be told."""
    for probe in PROBES:
        whole = list(tokenizer(probe)["input_ids"])
        plain = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        for at in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[at : at + len(plain)] == plain:
                return whole[:at], whole[at + len(plain) :]
    return [], []


def without_tail(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Token ids without the special tokens put after them: an end of text, a separator."""
    _, after = special_around(tokenizer)
    found = list(ids)
    return found[: len(found) - len(after)] if after and found[-len(after) :] == after else found


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt: special tokens in front as the tokenizer puts them, none at the end."""
    return without_tail(tokenizer, tokenizer(text)["input_ids"])
