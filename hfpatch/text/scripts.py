"""Scripts in which a space does not tell where a word ends."""

import regex

# For a character class; Korean is among them because it writes endings onto its words and numbers.
UNSPACED = (
    r"\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{scx=Hang}\p{scx=Bopo}\p{scx=Yiii}\p{scx=Thai}\p{scx=Laoo}"
    r"\p{scx=Khmr}\p{scx=Mymr}\p{scx=Tibt}\p{scx=Lana}\p{scx=Java}\p{scx=Bali}"
)
_LETTER = rf"[\p{{L}}&&[{UNSPACED}]]"
_LONGEST = 100
_WORD = regex.compile(rf"(?V1)\s*(?:{_LETTER}\p{{M}}*|(?:(?!{_LETTER})\S){{1,{_LONGEST}}})")


def words(text: str) -> list[str]:
    """The text in words, each with the white space before it; where words are written together, in characters."""
    return _WORD.findall(text)
