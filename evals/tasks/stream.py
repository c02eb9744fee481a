"""Facts in a haystack of any length, written piece by piece: nothing but one batch of sentences is held."""

from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from ..errors import EvaluationError

_BATCH = 64


def stream(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[str],
    depths: Sequence[float],
    source: Iterator[str],
    length: int,
) -> Iterator[str]:
    """Pieces of a text of at most `length` tokens: sentences of `source`, the facts where their depths in [0, 1] say.

    Joined by "" the pieces are whole sentences with a space after each. Raises EvaluationError when facts alone do
    not fit.
    """
    room = length - sum(_sizes(tokenizer, facts))
    if room < 0:
        raise EvaluationError(f"{length} tokens are too few for the facts alone; raise the length.")
    due = sorted(zip((d * room for d in depths), range(len(facts)), strict=True))
    done = 0
    while True:
        batch = list(islice(source, _BATCH))
        piece: list[str] = []
        for sentence, size in zip(batch, _sizes(tokenizer, batch), strict=True):
            last = done + size > room
            while due and (last or done >= due[0][0]):
                piece.append(facts[due.pop(0)[1]])
            if last:
                break
            piece.append(sentence)
            done += size
        yield "".join(f"{p} " for p in piece)
        if last:
            return


def _sizes(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    encoded = tokenizer([f" {t}" for t in texts], add_special_tokens=False)["input_ids"]
    return [len(ids) for ids in encoded]
