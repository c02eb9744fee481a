"""Settings that several methods have, by the names under which `Method` and `BlockSelector` know them."""

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


def question_tokens(default: int = 0) -> int:
    """Setting `question_tokens`."""
    return option(default, "last queries of a prefill call, which attend densely", ge=0)


def dense_layers(note: str = "") -> int:
    """Setting `dense_layers`: `Method.pick` leaves them out."""
    return option(0, "first decoder layers that stay dense" + note, ge=0)


def sink_blocks(default: int, old: str | None = "sink") -> int:
    """Setting `sink_blocks`."""
    return option(default, "first key blocks, always kept", ge=0, old=old)


def window_blocks(default: int, old: str | None = "window") -> int:
    """Setting `window_blocks`."""
    return option(default, "last key blocks up to the tile's own, always kept", ge=1, old=old)


def most_keys() -> int | float | None:
    """Setting `budget` of methods that keep what a rule says."""
    return option(None, "at most so many keys per tile (tokens or share), best first", gt=0, share=True)
