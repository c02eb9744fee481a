"""A text in pieces between which facts may stand: sentences of any script, and parts of what has none."""

from bisect import bisect_right
from collections.abc import Iterator

import regex
from transformers import PreTrainedTokenizerBase

from .grammar import SENTENCE_BORDER
from .scripts import UNSPACED

LONG, PART = 1500, 300  # bytes: beyond LONG it is no sentence, and is cut into lines or parts of at most PART

_CLOSING = r"[\"'”’»」』）》〉)\]]*"
_END = regex.compile(
    rf"(?V1)[。！？｡।॥؟۔።။།]+{_CLOSING}\s*|[.!?]+{_CLOSING}\s+(?=[\"'“‘«(]*[[\p{{Lu}}\p{{Lt}}\p{{Lo}}]--[A-Z]])"
)
_BROKEN_WORD = regex.compile(rf"(?V1)(?<=\s)[\S--[{UNSPACED}]]{{1,15}}$")


def split(text: str) -> Iterator[tuple[str, ...]]:
    """English sentences, each with the pieces it is made of; white space normalised, no piece empty.

    A piece ends where a sentence of another script ends; what is too long for a sentence is cut at its lines, at its
    words, between its characters.
    """
    for sentence in SENTENCE_BORDER.split(text.strip()):
        if len(_flat(sentence)) > 1:
            yield tuple(piece for part in _ended(sentence) for piece in _short(part))


def cut(tokenizer: PreTrainedTokenizerBase, text: str, room: int) -> tuple[str, str]:
    """As much of a text as `room` tokens take, one character at least and whole words if it has any, and the rest."""
    characters = regex.findall(r"\X", text)
    sizes = range(1, len(characters) + 1)
    count = max(1, bisect_right(sizes, room, key=lambda n: token_counts(tokenizer, ["".join(characters[:n])])[0]))
    begun, rest = "".join(characters[:count]), "".join(characters[count:])
    if rest and not rest[0].isspace() and (broken := _BROKEN_WORD.search(begun)):
        begun, rest = begun[: broken.start()], begun[broken.start() :] + rest
    return begun.strip(), rest.strip()


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Tokens of texts that follow a space, special ones aside."""
    spaced = [f" {text}" for text in texts]
    return [len(ids) for ids in tokenizer(spaced, add_special_tokens=False)["input_ids"]] if texts else []


def _flat(text: str) -> str:
    return " ".join(text.split())


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _ended(sentence: str) -> Iterator[str]:
    """Parts that end like sentences in scripts without ASCII capitals."""
    done = 0
    for end in _END.finditer(sentence):
        yield sentence[done : end.end()]
        done = end.end()
    yield sentence[done:]


def _short(part: str) -> Iterator[str]:
    flat = _flat(part)
    if _size(flat) > LONG:
        for line in part.splitlines():
            yield from _packed(_flat(line))
    elif flat:
        yield flat


def _packed(line: str) -> Iterator[str]:
    """Words, and characters of words that are too long, packed into parts of at most PART bytes."""
    packed = ""
    for word in regex.findall(r"\S+\s*", line):
        for part in regex.findall(r"\X", word) if _size(word) > PART else [word]:
            if packed and _size(packed + part) > PART:
                yield packed.strip()
                packed = ""
            packed += part
    if packed:
        yield packed.strip()
