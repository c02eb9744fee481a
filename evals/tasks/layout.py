"""Facts laid out in a haystack whose length is measured with the model's own tokenizer."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from transformers import PreTrainedTokenizerBase

from ..errors import EvaluationError

SLACK = 12
_BATCH = 32


@dataclass(frozen=True)
class Layout:
    """A prompt, its tokens (special ones included), the facts' depths in [0, 1] and where the closing tail begins."""

    prompt: str
    tokens: int
    depths: list[float]
    tail_at: int


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a prompt as the model gets it, special tokens included."""
    return len(tokenizer(text)["input_ids"])


def compose(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[str],
    depths: Sequence[float],
    source: Iterator[str] | None,
    length: int,
    head: str = "",
    tail: str = "",
) -> Layout:
    """`head`, sentences of `source` with the facts at the borders nearest to their depths, `tail`; lines apart.

    At most `length` tokens, and few less than that. Facts of equal depth keep their order. Raises EvaluationError when
    the facts alone do not fit.
    """
    least = _render(tokenizer, [], [], facts, [0.0] * len(facts), head, tail)
    if least.tokens > length:
        raise EvaluationError(
            f"{length} tokens are too few: question and facts alone take {least.tokens}; raise the length."
        )
    if source is None:
        return least
    hay, sizes = _draw(tokenizer, source, length - least.tokens)
    found = _render(tokenizer, hay, sizes, facts, depths, head, tail)
    while found.tokens > length:
        over = found.tokens - length
        while hay and over > 0:
            hay, sizes, over = hay[:-1], sizes[:-1], over - sizes[-1]
        found = _render(tokenizer, hay, sizes, facts, depths, head, tail)
    if rest := _shortened(tokenizer, next(source), length - found.tokens - 1):
        longer = _render(tokenizer, [*hay, rest[0]], [*sizes, rest[1]], facts, depths, head, tail)
        found = longer if longer.tokens <= length else found
    return found


def _render(
    tokenizer: PreTrainedTokenizerBase,
    hay: list[str],
    sizes: list[int],
    facts: Sequence[str],
    depths: Sequence[float],
    head: str,
    tail: str,
) -> Layout:
    ends = [0, *accumulate(sizes)]
    borders = [_nearest(ends, depth * ends[-1]) for depth in depths]
    parts: list[str] = []
    done = 0
    for border, n in sorted((border, n) for n, border in enumerate(borders)):
        parts += [*hay[done:border], facts[n]]
        done = border
    body = " ".join([*parts, *hay[done:]])
    start = "\n".join(part for part in (head, body) if part)
    prompt = f"{start}\n{tail}" if tail else start
    if hay:
        got = [ends[border] / ends[-1] for border in borders]
    else:
        got = [n / max(len(facts) - 1, 1) for n in range(len(facts))]
    return Layout(prompt, count_tokens(tokenizer, prompt), got, len(prompt) - len(tail))


def _nearest(ends: list[int], goal: float) -> int:
    after = min(bisect_left(ends, goal), len(ends) - 1)
    return after - 1 if after and goal - ends[after - 1] <= ends[after] - goal else after


def _draw(tokenizer: PreTrainedTokenizerBase, source: Iterator[str], room: int) -> tuple[list[str], list[int]]:
    """Sentences of `room` tokens at most, and their sizes."""
    hay: list[str] = []
    sizes: list[int] = []
    misses = 0
    while misses < 8:
        batch = list(islice(source, _BATCH))
        encoded = tokenizer([" " + s for s in batch], add_special_tokens=False)["input_ids"]
        for sentence, ids in zip(batch, encoded, strict=True):
            if len(ids) > room:
                misses += 1
                continue
            hay.append(sentence)
            sizes.append(len(ids))
            room -= len(ids)
    return hay, sizes


def _shortened(tokenizer: PreTrainedTokenizerBase, sentence: str, room: int) -> tuple[str, int] | None:
    """The first words of a sentence that fit into `room` tokens, with their size; None when too few do."""
    words = sentence.rstrip(".!?").split()
    while room >= SLACK and len(words) > 2:
        text = " ".join(words) + "."
        size = len(tokenizer(" " + text, add_special_tokens=False)["input_ids"])
        if size <= room:
            return text, size
        words = words[: max(2, min(len(words) - 1, int(len(words) * room / size)))]
    return None
