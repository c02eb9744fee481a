"""Cutting text of any length into sentences and packing these into chunks, without holding the text."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_FAITHFUL = re.compile(r"\n\n|[。！？.?!]")
_END = re.compile(r"[.?!…]+[\"'”’)\]]*\s+|[。！？]+[\"'”’）」]*\s*|\s*\n[ \t\r]*\n\s*")
_LINE = re.compile(r"\r?\n")
_SHORT = 10


@dataclass(frozen=True)
class Sentence:
    """A piece of the context: its text and its character span `start..end`."""

    text: str
    start: int
    end: int


def faithful_end(text: str, at: int) -> int | None:
    """End of the first sentence of `text[at:]` by the reference's rule, None if it may go on.

    A mark ends a sentence, except '.' when at most 10 characters follow up to the next mark.
    """
    for match in _FAITHFUL.finditer(text, at):
        following = _FAITHFUL.search(text, match.end())
        if following is None:
            return None
        if match.group() == "." and following.start() - match.end() <= _SHORT:
            continue
        return match.end()
    return None


def plain_end(text: str, at: int) -> int | None:
    """End of the first sentence of `text[at:]`: a mark followed by space, a CJK mark, or an empty line."""
    match = _END.search(text, at)
    return match.end() if match and match.end() < len(text) else None


def _cut(text: str, limit: int) -> int:
    """Where to cut a text without a sentence end: after its last line, else its last word, else at the limit."""
    lines = [m.end() for m in _LINE.finditer(text, 0, limit)]
    if lines:
        return lines[-1]
    space = text.rfind(" ", 1, limit)
    return space + 1 if space > 0 else limit


def sentences(
    pieces: Iterable[str], limit: int, end: Callable[[str, int], int | None] = plain_end, offset: int = 0
) -> Iterator[Sentence]:
    """Sentences of the text that `pieces` spell, none longer than `limit` characters; spans start at `offset`.

    Joined they give the text back exactly. Holds no more than one piece and one sentence at a time.
    """
    rest = ""
    for piece in pieces:
        text, at = rest + piece, 0
        while at < len(text):
            stop = end(text[at : at + limit + _SHORT * 4], 0)
            if stop is None or stop > limit:
                if len(text) - at < limit + _SHORT * 4:
                    break
                stop = _cut(text[at : at + limit], limit)
            yield Sentence(text[at : at + stop], offset, offset + stop)
            at, offset = at + stop, offset + stop
        rest = text[at:]
    while rest:
        stop = end(rest, 0)
        if stop is None or stop > limit:
            stop = len(rest) if len(rest) <= limit else _cut(rest[:limit], limit)
        yield Sentence(rest[:stop], offset, offset + stop)
        rest, offset = rest[stop:], offset + stop


@dataclass(frozen=True)
class Encoded:
    """A sentence with its token ids."""

    sentence: Sentence
    ids: tuple[int, ...]


def encode(sentence: Sentence, tokenize: Callable[[str], list[int]], limit: int) -> Iterator[Encoded]:
    """The sentence with its ids, halved until no part has more than `limit` tokens."""
    ids = tokenize(sentence.text)
    if len(ids) <= limit or len(sentence.text) < 2:
        yield Encoded(sentence, tuple(ids[:limit]))
        return
    mid = len(sentence.text) // 2
    cut = sentence.start + mid
    yield from encode(Sentence(sentence.text[:mid], sentence.start, cut), tokenize, limit)
    yield from encode(Sentence(sentence.text[mid:], cut, sentence.end), tokenize, limit)


def chunks(
    source: Iterable[Sentence], tokenize: Callable[[str], list[int]], chunk_tokens: int
) -> Iterator[list[Encoded]]:
    """Consecutive sentences packed into chunks of at most `chunk_tokens` tokens."""
    chunk: list[Encoded] = []
    size = 0
    for sentence in source:
        for part in encode(sentence, tokenize, chunk_tokens):
            if chunk and size + len(part.ids) > chunk_tokens:
                yield chunk
                chunk, size = [], 0
            chunk.append(part)
            size += len(part.ids)
    if chunk:
        yield chunk
