"""Settings under the names of earlier versions: taken everywhere, with one warning that tells the new ones."""

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import ConfigError

_OURS = {"hfpatch", "contextlib"}


def old_names(cls: type) -> dict[str, str]:
    """Earlier name -> name of the settings of a config class; a name that is in use again is none."""
    fields = dataclasses.fields(cls)
    taken = {f.name for f in fields}
    return {old: f.name for f in fields if (old := f.metadata.get("old")) is not None and old not in taken}


def renewed(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under their names of today; a DeprecationWarning tells old ones. Raises ConfigError for both."""
    known, name = old_names(cls), getattr(cls, "method", "") or cls.__name__
    given = {old: known[old] for old in settings if old in known}
    for old, new in given.items():
        if new in settings:
            raise ConfigError(f"{name}: {old} is the earlier name of {new}, which is given too; leave {old} out.")
    if given:
        told = ", ".join(f"{old} is now {new}" for old, new in given.items())
        warnings.warn(f"{name}: the setting {told}.", DeprecationWarning, stacklevel=_level_outside())
    return {given.get(k, k): v for k, v in settings.items()}


def _level_outside() -> int:
    """The stack level, for a warning of the caller, of the nearest code that is not ours."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def unwarned() -> Iterator[None]:
    """Look settings over without a word about old names: they are read again afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class TakesOldNames(type):
    """Classes whose constructor knows its keywords by their earlier names, too."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        return super().__call__(*args, **renewed(cls, settings))

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the constructor, which editors show."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])
