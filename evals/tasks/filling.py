"""Pieces of a haystack drawn, shortened and opened, so that length and depths come out as asked for."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

from transformers import PreTrainedTokenizerBase

from hfpatch.text.pieces import cut, token_counts
from hfpatch.text.scripts import words

SLACK = 12
_BATCH, _MISSES = 32, 8


def little(length: int) -> int:
    """Tokens by which a prompt of `length` tokens may miss its length, and a fact its place."""
    return max(32, length // 20)


def nearest(ends: Sequence[int], goal: float) -> int:
    """Index of the border nearest to `goal`; `ends` are the borders' places in tokens, rising from 0."""
    after = min(bisect_left(ends, goal), len(ends) - 1)
    return after - 1 if after and goal - ends[after - 1] <= ends[after] - goal else after


def draw(tokenizer: PreTrainedTokenizerBase, source: Iterator[str], room: int) -> tuple[list[str], list[int]]:
    """Pieces of `room` tokens at most, and their sizes; a few that are too long, or that hold no token, end it."""
    hay: list[str] = []
    sizes: list[int] = []
    misses = 0
    while misses < _MISSES:
        batch = list(islice(source, _BATCH))
        for piece, size in zip(batch, token_counts(tokenizer, batch), strict=True):
            if size > room or not size:
                misses += 1
                continue
            hay.append(piece)
            sizes.append(size)
            room -= size
    return hay, sizes


def shortened(tokenizer: PreTrainedTokenizerBase, piece: str, room: int, by_character: bool) -> tuple[str, int] | None:
    """The first words of a piece that fit into `room` tokens, with their size; None when too few do.

    `by_character` takes as many characters as fit where there are no three words.
    """
    said = words(piece.rstrip(".!?"))
    while room >= SLACK and len(said) > 2:
        text = "".join(said) + "."
        size = token_counts(tokenizer, [text])[0]
        if size <= room:
            return text, size
        said = said[: max(2, min(len(said) - 1, int(len(said) * room / size)))]
    if not by_character:
        return None
    text, _ = cut(tokenizer, piece, room)
    size = token_counts(tokenizer, [text])[0]
    return (text, size) if 0 < size <= room else None


def opened(
    tokenizer: PreTrainedTokenizerBase, hay: list[str], sizes: list[int], goals: Sequence[tuple[float, int]]
) -> bool:
    """Cut in two, in place, pieces in which a fact should stand farther from either end than allowed.

    `goals` are depths in [0, 1], each with the tokens by which it may be missed. False when nothing was cut.
    """
    before = len(hay)
    for depth, allowed in goals:
        ends = [0, *accumulate(sizes)]
        goal = depth * ends[-1]
        if abs(ends[nearest(ends, goal)] - goal) <= allowed:
            continue
        n = bisect_left(ends, goal) - 1
        first, rest = cut(tokenizer, hay[n], int(goal - ends[n]))
        if first and rest:
            hay[n : n + 1], sizes[n : n + 1] = [first, rest], token_counts(tokenizer, [first, rest])
    return len(hay) > before


def trim(tokenizer: PreTrainedTokenizerBase, hay: list[str], sizes: list[int], over: int) -> None:
    """Take `over` tokens, and few more, from the end, in place."""
    last, size = hay.pop(), sizes.pop()
    if size > over:
        rest, _ = cut(tokenizer, last, size - over)
        left = token_counts(tokenizer, [rest])[0]
        if left <= size - over:
            hay.append(rest)
            sizes.append(left)
