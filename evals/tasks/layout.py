"""Facts laid out in a haystack whose length is measured with the model's own tokenizer."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

from transformers import PreTrainedTokenizerBase

from hfpatch.text.prompt_ids import prompt_ids

from ..errors import EvaluationError
from .filling import draw, little, nearest, opened, shortened, trim

_TRIES, _DRAWN = 16, 4


@dataclass(frozen=True)
class Layout:
    """A prompt, its tokens (special ones included), the facts' depths in [0, 1], where the closing question begins."""

    prompt: str
    tokens: int
    depths: list[float]
    question_at: int


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a prompt as the model gets it, special tokens included."""
    return len(prompt_ids(tokenizer, text))


def compose(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[str],
    depths: Sequence[float],
    source: Iterator[str] | None,
    length: int,
    head: str = "",
    tail: str = "",
    drawn: Collection[int] = (),
    lead: str = "",
) -> Layout:
    """`lead`, `head`, pieces of `source` with the facts at the borders nearest to their depths, `tail`; lines apart.

    At most `length` tokens, and few less than that. Facts of equal depth keep their order; nobody asked for the depths
    of those in `drawn`, which may be missed by more. Raises EvaluationError when the facts alone do not fit, and when
    the length or a depth is missed by more than a little.
    """
    around = lead, head, tail
    least = _render(tokenizer, facts, [0.0] * len(facts), around, [], [])
    if least.tokens > length:
        raise EvaluationError(
            f"{length} tokens are too few: question and facts alone take {least.tokens}; raise the length."
        )
    if source is None:
        return least
    render = partial(_render, tokenizer, facts, depths, around)
    hay, sizes = draw(tokenizer, source, length - least.tokens)
    found = render(hay, sizes)
    while found.tokens > length:
        over = found.tokens - length
        while hay and over > 0:
            hay, sizes, over = hay[:-1], sizes[:-1], over - sizes[-1]
        found = render(hay, sizes)
    spare = 1
    for piece in islice(source, _TRIES):
        missing = length - found.tokens
        if rest := shortened(tokenizer, piece, missing - spare, missing > little(length)):
            longer = [*hay, rest[0]], [*sizes, rest[1]]
            tried = render(*longer)
            if tried.tokens <= length:
                (hay, sizes), found = longer, tried
            else:
                spare += 1
        if length - found.tokens <= little(length):
            break
    goals = [(d, little(length) * (_DRAWN if n in drawn else 1)) for n, d in enumerate(depths)]
    if opened(tokenizer, hay, sizes, goals):
        found = render(hay, sizes)
        while found.tokens > length:
            trim(tokenizer, hay, sizes, found.tokens - length)
            found = render(hay, sizes)
    _check_depths(found, goals, sum(sizes))
    return check_filled(found, length)


def check_filled(found: Layout, length: int) -> Layout:
    """The layout, if it is about as long as asked for. Raises EvaluationError."""
    short = length - found.tokens
    if short > little(length):
        raise EvaluationError(
            f"the prompt comes to {found.tokens} of {length} tokens, {short} too few, and this haystack gives the "
            "tokenizer no more to fill it with; choose another haystack."
        )
    return found


def _check_depths(found: Layout, goals: Sequence[tuple[float, int]], hay: int) -> None:
    for (wanted, allowed), got in zip(goals, found.depths, strict=True):
        off = round(abs(got - wanted) * hay)
        if off > allowed:
            raise EvaluationError(
                f"the fact for depth {wanted:.0%} would stand at {got:.0%} of the haystack, {off} tokens off, as "
                "its pieces are too long; choose another haystack."
            )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[str],
    depths: Sequence[float],
    around: tuple[str, str, str],
    hay: list[str],
    sizes: list[int],
) -> Layout:
    lead, head, tail = around
    ends = [0, *accumulate(sizes)]
    borders = [nearest(ends, depth * ends[-1]) for depth in depths]
    parts: list[str] = []
    done = 0
    for border, n in sorted((border, n) for n, border in enumerate(borders)):
        parts += [*hay[done:border], facts[n]]
        done = border
    body = " ".join([*parts, *hay[done:]])
    start = lead + "\n".join(part for part in (head, body) if part)
    prompt = f"{start}\n{tail}" if tail else start
    if hay:
        got = [ends[border] / ends[-1] for border in borders]
    else:
        got = [n / max(len(facts) - 1, 1) for n in range(len(facts))]
    return Layout(prompt, count_tokens(tokenizer, prompt), got, len(prompt) - len(tail.lstrip()))
