"""Where haystack sentences come from: the grammar, the shipped prose, a text file, a Hub data set."""

import codecs
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ..errors import EvaluationError
from . import grammar
from .pieces import split

HUB = "hub:"
_HUB_CHARACTERS = 4_000_000


def sentences(source: str, rng: random.Random) -> Iterator[str]:
    """Endless sentences of `grammar`, `prose`, a text file or `hub:OWNER/NAME[:SPLIT[:COLUMN]]`, from a random start.

    Raises EvaluationError.
    """
    if source == "grammar":
        return grammar.grammar_sentences(rng)
    if source == "prose":
        return grammar.prose_sentences(rng)
    return _around(_read(source), rng)


def _around(known: tuple[tuple[str, ...], ...], rng: random.Random) -> Iterator[str]:
    index = rng.randrange(len(known))
    skipped = rng.randrange(len(known[index])) if len(known[index]) > 1 else 0
    yield from known[index][skipped:]
    while True:
        index += 1
        yield from known[index % len(known)]


@lru_cache(maxsize=4)
def _read(source: str) -> tuple[tuple[str, ...], ...]:
    words = _read_hub(source) if source.startswith(HUB) else read_text(source)
    found = tuple(split(words))
    if not found:
        raise EvaluationError(f"The haystack {source!r:.200} holds no sentences; choose another text.")
    return found


def read_text(name: str) -> str:
    """A UTF-8 text file, with or without a byte order mark. Raises EvaluationError saying what is wrong with it."""
    path = Path(name)
    try:
        if path.is_dir():
            raise EvaluationError(f"The haystack {name!r:.200} is a folder; name a text file in it.")
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(name) from error
    except OSError as error:
        raise EvaluationError(f"The haystack {name!r:.200} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise EvaluationError(
            f"The haystack {name!r:.200} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,}"
            f"{'; it looks like UTF-16' if wide else ''}); save it as UTF-8."
        ) from error
    except ValueError as error:  # a path with a NUL in it
        raise _missing(name) from error
    if "\0" in text:
        raise EvaluationError(f"The haystack {name!r:.200} holds NUL bytes, so it is no UTF-8 text; save it as UTF-8.")
    return text


def _missing(name: str) -> EvaluationError:
    return EvaluationError(
        f"There is no haystack {name!r:.200}; write grammar, prose, the path of a UTF-8 text file or "
        f"{HUB}OWNER/NAME[:SPLIT[:COLUMN]]."
    )


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
            f"Cannot read the haystack {source!r:.99} ({type(error).__name__}); check name, split and text column, or "
            "give a text file."
        ) from error
