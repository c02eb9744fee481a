"""Haystacks of sentences, measured with the model's own tokenizer."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .errors import EvaluationError
from .testbed import text

SOURCES = ("grammar", "prose")


@dataclass(frozen=True)
class Prompt:
    """A filled haystack: its text, its tokens (special ones included) and the depth the needle got in [0, 1]."""

    text: str
    tokens: int
    depth: float


def sentences(source: str, rng: random.Random) -> Iterator[str]:
    """Endless sentences of `grammar`, `prose` or a text file. Raises EvaluationError."""
    if source == "grammar":
        return text.grammar_sentences(rng)
    if source == "prose":
        return text.prose_sentences(rng)
    path = Path(source)
    if not path.is_file():
        raise EvaluationError(f"There is no haystack {source!r}; write grammar, prose or the path of a text file.")
    words = path.read_text(encoding="utf-8")
    if not text.split_sentences(words):
        raise EvaluationError(f"The haystack {source!r} holds no sentences.")
    return text.prose_sentences(rng, words)


def count_tokens(tokenizer: PreTrainedTokenizerBase, words: str) -> int:
    """Tokens of a prompt as the model gets it, special tokens included."""
    return len(tokenizer(words)["input_ids"])


def fill(
    tokenizer: PreTrainedTokenizerBase, source: Iterator[str], needle: str, tail: str, length: int, depth: float
) -> Prompt:
    """Sentences, with `needle` at the border nearest to `depth` in [0, 1], then `tail`: at most `length` tokens.

    No further sentence of average size would fit. Raises EvaluationError when the needle alone does not.
    """
    fixed = count_tokens(tokenizer, f"{needle}\n{tail}")
    if fixed > length:
        raise EvaluationError(f"{length} tokens are too few: needle and question alone take {fixed}.")
    hay, sizes = _draw(tokenizer, source, length - fixed)
    while True:
        at = _border(sizes, depth)
        body = " ".join([*hay[:at], needle, *hay[at:]])
        prompt = f"{body}\n{tail}"
        tokens = count_tokens(tokenizer, prompt)
        if tokens <= length:
            return Prompt(prompt, tokens, sum(sizes[:at]) / max(sum(sizes), 1))
        hay, sizes = hay[:-1], sizes[:-1]


def _draw(tokenizer: PreTrainedTokenizerBase, source: Iterator[str], room: int) -> tuple[list[str], list[int]]:
    hay: list[str] = []
    sizes: list[int] = []
    misses = 0
    while misses < 8:
        batch = list(islice(source, 32))
        encoded = tokenizer([" " + s for s in batch], add_special_tokens=False)["input_ids"]
        for sentence, ids in zip(batch, encoded, strict=True):
            if len(ids) > room:
                misses += 1
                continue
            hay.append(sentence)
            sizes.append(len(ids))
            room -= len(ids)
    return hay, sizes


def _border(sizes: list[int], depth: float) -> int:
    goal, done = depth * sum(sizes), 0
    best, distance = 0, goal
    for n, size in enumerate(sizes, 1):
        done += size
        if abs(done - goal) <= distance:
            best, distance = n, abs(done - goal)
    return best
