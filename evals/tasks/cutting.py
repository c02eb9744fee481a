"""Long texts cut to what a model has room for, as benchmarks do: in the middle."""

from bisect import bisect_left, bisect_right
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from hfpatch.text.pieces import split, token_counts

from ..errors import EvaluationError


def within(tokenizer: PreTrainedTokenizerBase, text: str, room: int) -> str:
    """The text where it takes at most `room` tokens, else its first and its last sentences, half of them each."""
    if room < 0:
        raise EvaluationError("The model's window has no room for a text beside the question; use a longer window.")
    pieces = [piece for sentence in split(text) for piece in sentence]
    ends = [0, *accumulate(token_counts(tokenizer, pieces))]
    if ends[-1] <= room:
        return text
    first = bisect_right(ends, room // 2) - 1
    last = bisect_left(ends, ends[-1] - room // 2)
    return " ".join([*pieces[:first], *pieces[last:]])
