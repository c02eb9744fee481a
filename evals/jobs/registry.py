"""Kinds of job by name: one module per kind in this folder, others by `register_job` or entry points."""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from ..errors import EvaluationError
from .base import Job

ENTRY_POINT_GROUP = "hfpatch.jobs"
GROUPS = ("task", "measure")
_registered: dict[str, type[Job]] = {}
J = TypeVar("J", bound=type[Job])


def register_job(cls: J) -> J:
    """Class decorator that makes a kind of job known by its `kind`. Raises EvaluationError when that is taken."""
    other = _registered.get(cls.kind)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise EvaluationError(f"The kind of job {cls.kind!r} is taken by {other.__module__}; choose another.")
    if cls.group not in GROUPS:
        raise EvaluationError(f"{cls.__name__}: its group {cls.group!r} is not one of {', '.join(GROUPS)}.")
    _registered[cls.kind] = cls
    return cls


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def job_kinds() -> dict[str, type[Job]]:
    """All kinds of job, by name."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    for found in _entry_points():
        if found.name not in _registered:
            register_job(found.load())
    return dict(sorted(_registered.items()))


def named(group: str, name: str) -> type[Job] | None:
    """The kind a recipe means by `name` under `group`; None if there is none."""
    kinds = [cls for cls in job_kinds().values() if cls.group == group]
    return next((c for c in kinds if c.kind == name and not c.takes_any_name), None) or next(
        (c for c in kinds if c.takes_any_name), None
    )
