"""Facts in a haystack of any length, written piece by piece: nothing but one batch of pieces is held."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil

from transformers import PreTrainedTokenizerBase

from hfpatch.text.pieces import cut, token_counts

from ..errors import EvaluationError
from .filling import little

_BATCH = 64


def stream(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[str],
    depths: Sequence[float],
    source: Iterator[str],
    length: int,
) -> Iterator[str]:
    """Pieces of a text of at most `length` tokens: those of `source`, the facts where their depths in [0, 1] say.

    Joined by "" they are whole sentences with a space after each; a sentence is cut where it would move a fact or the
    end by more than a little. Raises EvaluationError when facts alone do not fit, and when that cannot be helped.
    """
    room = length - sum(token_counts(tokenizer, list(facts)))
    if room < 0:
        raise EvaluationError(f"{length} tokens are too few for the facts alone; raise the length.")
    due = deque(sorted(zip((d * room for d in depths), range(len(facts)), strict=True)))
    done, last = 0, False
    while not last:
        before, waiting, piece = done, deque(islice(source, _BATCH)), list[str]()
        sizes = deque(token_counts(tokenizer, list(waiting)))
        while waiting and not last:
            sentence, size = waiting.popleft(), sizes.popleft()
            ahead = next((place - done for place, _ in due if place > done), 0)
            if at := _cut_at(size, ahead, room - done, little(length)):
                sentence, rest = cut(tokenizer, sentence, at)
                size, *left = token_counts(tokenizer, [sentence, rest] if rest else [sentence])
                waiting.extendleft([rest] if rest else [])
                sizes.extendleft(left)
            last = done + size > room
            while due and (last or done >= due[0][0]):
                place, n = due.popleft()
                _check(abs(done - place), little(length), "a fact would stand")
                piece.append(facts[n])
            if not last:
                piece.append(sentence)
                done += size
        _check(room - done if last or done == before else 0, little(length), "the text would end")
        yield "".join(f"{p} " for p in piece)


def _cut_at(size: int, due: float, end: int, little: int) -> int:
    """Tokens after which to cut a sentence of `size` tokens, a fact being due and the text ending in so many; or 0."""
    if due > 0 and size - due > little:
        return ceil(due)
    return end - 2 if size > end > little else 0


def _check(off: float, little: int, what: str) -> None:
    if off > little:
        raise EvaluationError(
            f"{what} {off:.0f} tokens from its place, as this haystack gives the tokenizer no pieces that fit; choose "
            "another haystack."
        )
