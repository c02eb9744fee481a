"""Where haystack sentences come from: the grammar, the shipped prose, a text file, a Hub data set."""

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ..errors import EvaluationError
from ..testbed import text

HUB = "hub:"
_HUB_CHARACTERS = 4_000_000


def sentences(source: str, rng: random.Random) -> Iterator[str]:
    """Endless sentences of `grammar`, `prose`, a text file or `hub:OWNER/NAME[:SPLIT[:COLUMN]]`, from a random start.

    Raises EvaluationError.
    """
    if source == "grammar":
        return text.grammar_sentences(rng)
    if source == "prose":
        return text.prose_sentences(rng)
    return _around(_read(source), rng)


def _around(known: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    index = rng.randrange(len(known))
    while True:
        yield known[index % len(known)]
        index += 1


@lru_cache(maxsize=4)
def _read(source: str) -> tuple[str, ...]:
    words = _read_hub(source) if source.startswith(HUB) else _read_file(Path(source))
    found = tuple(text.split_sentences(words))
    if not found:
        raise EvaluationError(f"The haystack {source!r} holds no sentences; choose another text.")
    return found


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"There is no haystack {str(path)!r}; write grammar, prose, the path of a UTF-8 text file or "
            f"{HUB}OWNER/NAME[:SPLIT[:COLUMN]]."
        ) from error


def _read_hub(source: str) -> str:
    """The first few million characters of a text column."""
    name, split, column, *_ = [*source.removeprefix(HUB).split(":"), "", ""]
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split=split or "train", streaming=True)
        parts, size = [], 0
        for row in islice(rows, 100_000):
            key = column or next(k for k in ("text", "content", *row) if isinstance(row.get(k), str))
            parts.append(row[key])
            size += len(row[key])
            if size > _HUB_CHARACTERS:
                break
        return "\n".join(parts)
    except ImportError as error:
        raise EvaluationError("Hub haystacks need datasets; run `pip install 'hfpatch[eval]'`.") from error
    except (OSError, ValueError, KeyError, StopIteration, ConnectionError) as error:
        raise EvaluationError(
            f"Cannot read the haystack {source!r} ({type(error).__name__}); check its name, split and text column, or "
            "give a text file."
        ) from error
