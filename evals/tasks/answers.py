"""Whether an answer stands in a text: as whole words and whole numbers, in any script."""

import unicodedata

import regex

from hfpatch.text.scripts import UNSPACED

_DIGIT = regex.compile(r"\p{Nd}")
_GROUPED = regex.compile(
    r"(?<![\d.]|\d,)(?:\d{1,3}([,'’_٬\u00a0\u2009\u202f])\d{3}(?:\1\d{3})*|\d{1,2}(?:,\d{2})+,\d{3})(?!\d|,\d)"
)
_THOUGHT = regex.compile(r"(?s)\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)")
_WORD = rf"(?V1)[[\p{{L}}\p{{M}}\p{{Nd}}\u200c\u200d]--[{UNSPACED}]]"
# What may not stand before and after an answer that begins or ends with a character of the kind.
_BESIDE = {
    "digit": (r"(?<!\d|\p{LC}|\d[.٫])", r"(?!\d|\p{LC}|[.٫]\d)"),
    "letter": (rf"(?<!{_WORD})", rf"(?!{_WORD})"),
    "unspaced": ("", r"(?!\p{M})"),
    "other": ("", ""),
}


def holds(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text`, whatever the case, the digits and the grouping of numbers.

    A number inside a longer one, also as in 1,234 or 12.34, does not count, nor does a word inside another. Letters of
    scripts that write words together make no word longer, and letters without case make no number another.
    """
    wanted = _plain(answer)
    if not wanted:
        return False
    before, after = _BESIDE[_kind(wanted[0])][0], _BESIDE[_kind(wanted[-1])][1]
    return regex.search(before + regex.escape(wanted) + after, _plain(text)) is not None


def without_thoughts(output: str) -> str:
    """A generated text without the parts in which the model thinks, the blanks in front of the rest aside."""
    return _THOUGHT.sub("", output).lstrip()


def first_line(output: str) -> str:
    """The first line of an answer, thinking parts cut."""
    return without_thoughts(output).partition("\n")[0]


def _plain(text: str) -> str:
    """One way to write what can be written in several."""
    text = unicodedata.normalize("NFC", text).casefold()
    text = _DIGIT.sub(lambda found: str(unicodedata.decimal(found[0])), text)
    text = _GROUPED.sub(lambda found: regex.sub(r"\D", "", found[0]), text)
    return " ".join(text.split())


def _kind(character: str) -> str:
    if character.isdecimal():
        return "digit"
    if regex.match(r"[\p{L}\p{M}]", character) is None:
        return "other"
    return "unspaced" if regex.match(f"[{UNSPACED}]", character) else "letter"
