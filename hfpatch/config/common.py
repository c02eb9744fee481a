"""Settings that several methods have, by the names under which `Method` and `BlockSelector` know them.

A `budget` of a method that chooses key blocks for tiles of queries means the same in all of them. A whole number is
tokens: no query sees more. Any other is a share of the keys that a tile's queries can see, so that early ones get few
keys, late ones many, and the density counted over a prompt is about that share; `floor` is the number of keys that it
leaves every query room for even so, which lifts the density of short prompts. First and recent blocks come first and
take at most half of the budget, a tile's own blocks aside, which no budget takes away.
`question_tokens` are outside of it.
"""

from .method_config import option

SHARES = ("group", "head", "all")


def head_sharing(default: str = "group") -> str:
    """Setting `head_sharing`."""
    who = "who shares a choice: the heads of a KV group, no one, or all heads"
    return option(default, who, choices=SHARES, old="share")


def phase() -> str:
    """Setting `phase`: `Method.acts_in` follows it."""
    return option("both", "where the method acts", choices=("both", "prefill", "decode"))


def min_length() -> int:
    """Setting `min_length`: see `Method.too_short`."""
    return option(2048, "calls with fewer keys run dense", ge=0)


def question_tokens(default: int = 0, old: str | None = None) -> int:
    """Setting `question_tokens`: see `AttentionCall.asking`."""
    return option(default, "last queries of a prefill call, which attend densely", ge=0, old=old)


def dense_layers(note: str = "") -> int:
    """Setting `dense_layers`: `Method.pick` leaves them out."""
    return option(0, "first decoder layers that stay dense" + note, ge=0)


def sink_blocks(default: int, old: str | None = "sink") -> int:
    """Setting `sink_blocks`."""
    return option(default, "first key blocks, always kept; at most half of a budget", ge=0, old=old)


def window_blocks(default: int, old: str | None = "window") -> int:
    """Setting `window_blocks`."""
    return option(
        default, "last key blocks up to the tile's own, always kept; at most half of a budget", ge=1, old=old
    )


def most_keys() -> int | float | None:
    """Setting `budget` of methods that keep what a rule says."""
    return option(None, "at most so many keys: tokens, or a share of the visible ones; best first", gt=0, share=True)


def floor(default: int = 256) -> int:
    """Setting `floor`."""
    return option(default, "keys that every query has room for at least where `budget` is a share", ge=0)
