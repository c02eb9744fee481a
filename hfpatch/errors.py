"""Everything hfpatch raises on bad input; each message says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

from .values import shown


def reason(error: Exception) -> str:
    """What someone else's error says, on one line and not too long, for a message of our own."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class HfpatchError(Exception):
    """Base of all errors raised by hfpatch."""


class UnknownMethodError(HfpatchError):
    """A method name nobody registered."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known methods: {', '.join(known)}."
        super().__init__(f"There is no method called {shown(name)}; {hint}")
        self.name, self.near = name, near


class ConfigError(HfpatchError):
    """A setting with a wrong name, type or value."""


class SaveError(HfpatchError):
    """A patch that could not be written; its folder holds what it held before, or all of the new patch."""


class NothingLearnedError(HfpatchError):
    """A calibration whose result is no better than none; nothing was saved."""


class UnsupportedModelError(HfpatchError):
    """The model's attention cannot be patched."""


class NothingPatchedError(HfpatchError):
    """The model could be patched, but no layer was left after selection."""


class AlreadyPatchedError(HfpatchError):
    """The model carries a patch already."""


class NotPatchedError(HfpatchError):
    """The model carries no patch."""


class IncompatibleMethodsError(HfpatchError):
    """Methods that cannot act on the same layer."""


class ExecutorError(HfpatchError):
    """The executor asked for cannot run this call."""


class CacheError(HfpatchError):
    """A key-value cache that a patch cannot work with, or that has been cropped for another."""


class InputError(HfpatchError):
    """Text, tokenizer or files that a method cannot work with."""


class EvaluationError(HfpatchError):
    """An evaluation that cannot be run as asked."""


class FileError(EvaluationError):
    """A file that says something it should not; the message starts with file and line."""
