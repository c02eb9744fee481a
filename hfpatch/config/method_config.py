"""Method settings as validated dataclasses."""

import dataclasses
import operator
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from transformers.utils import logging

from ..errors import ConfigError
from ..values import Misfit, OutOfRange, fitted, shown, type_name
from .old_names import TakesOldNames, old_names, renewed

T = TypeVar("T")
logger = logging.get_logger(__name__)
_SIGNS = {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le)}


def option(
    default: T,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: tuple[Any, ...] | None = None,
    share: bool = False,
    old: str | None = None,
) -> T:
    """A documented setting with its range, checked whenever a config is made; `old` is its earlier name.

    Of a `share`, whole numbers are tokens and others a share of the keys, at most 1.
    """
    meta = {"help": help, "ge": ge, "gt": gt, "le": le, "choices": choices, "share": share, "old": old}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def _within(value: float, meta: Mapping[str, Any]) -> bool:
    return all(holds(value, meta[key]) for key, (_, holds) in _SIGNS.items() if meta.get(key) is not None)


def _bounds(meta: Mapping[str, Any], lead: str = "") -> str:
    known = [f"{sign} {meta[key]}" for key, (sign, _) in _SIGNS.items() if meta.get(key) is not None]
    return lead + " and ".join(known) if known else ""


@dataclass(kw_only=True)
class MethodConfig(metaclass=TakesOldNames):
    """Settings every method has; a method adds its own fields with `option(...)`.

    Values are converted to their field's type where nothing is lost (tuple to list, numpy number to Python's).
    Raises ConfigError naming the field, the value and what is allowed.
    """

    method: ClassVar[str] = ""
    layers: int | str | list[int] | None = option(
        None, "decoder layers to patch: a number, a list, or text such as '2-', '0-3,8', '-4-'; all when None"
    )
    executor: str | None = option(None, "attention executor to use; chosen by device and selection when None")

    def __post_init__(self) -> None:
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:
            ((name, value),) = renewed(type(self), {name: value}).items()
        object.__setattr__(self, name, value)

    def check(self) -> None:
        """Check and convert every field; a method does so again, for fields set since. Raises ConfigError."""
        hints = typing.get_type_hints(type(self), include_extras=True)
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, self._checked(f, getattr(self, f.name), hints[f.name]))
        self.validate()

    def validate(self) -> None:
        """Checks that involve several fields; raise ConfigError."""

    def _checked(self, f: "dataclasses.Field[Any]", value: Any, hint: Any) -> Any:
        where, meta = f"{self.method or type(self).__name__}: {f.name}={shown(value)}", f.metadata
        try:
            value = fitted(value, hint)
        except Misfit:
            plain = typing.get_type_hints(type(self))[f.name]
            raise ConfigError(f"{where} has the wrong type; it takes {type_name(plain)}.") from None
        except OutOfRange as error:
            raise ConfigError(f"{where} is out of range; {error}{_bounds(meta, ', and ')}.") from None
        if meta.get("choices") and value not in meta["choices"]:
            raise ConfigError(f"{where} is not one of {', '.join(map(repr, meta['choices']))}.")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not _within(value, meta):
            raise ConfigError(f"{where} is out of range; it must be {_bounds(meta)}.")
        if meta.get("share") and isinstance(value, float) and value > 1:
            raise ConfigError(f"{where} is out of range; a share of the keys is at most 1.0, tokens are whole.")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the method's name and every field."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def takes(cls) -> frozenset[str]:
        """Every name by which a setting may be given, those of earlier versions among them."""
        return frozenset({f.name for f in dataclasses.fields(cls)} | old_names(cls).keys())

    @classmethod
    def renewed(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by their names of today; warns of earlier ones. Raises ConfigError where one is given by both."""
        return renewed(cls, settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, newer: bool = False) -> "MethodConfig":
        """Config from plain data; unknown keys raise, or are dropped with a warning when the file is `newer`."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.method}: settings are names with values, not {shown(data)}.")
        known = {f.name for f in dataclasses.fields(cls)}
        data = renewed(cls, {k: v for k, v in data.items() if k != "method"})
        unknown = sorted(shown(k) for k in data if k not in known)
        if unknown and newer:
            logger.warning("%s: settings from a newer hfpatch are ignored: %s", cls.method, ", ".join(unknown))
        elif unknown:
            raise ConfigError(
                f"{cls.method}: there is no setting {unknown[0]}; settings are {', '.join(sorted(known))}."
            )
        return cls(**{k: v for k, v in data.items() if k in known})
