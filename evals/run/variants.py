"""Patch specs as users write them -> named variants; the unpatched model always comes first."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hfpatch import MethodConfig, PatchConfig, get_method, list_methods, patched
from hfpatch.api import Patch
from hfpatch.config.patch_config import CONFIG_FILE
from hfpatch.config.registry import list_presets, make_config
from hfpatch.errors import ConfigError
from hfpatch.files.json_text import load_json

from .patch_files import read_patch

DENSE, THROUGH = "dense", "dense through hfpatch"
_DRIVE = re.compile(r"[A-Za-z]:([^=]+$|[\\/])")  # C:\patches, C:patches, but x:window=64
_SLASH = re.compile(r"[^=]*[\\/]")
_PART = re.compile(r"(?P<name>[\w-]+)(?::(?P<settings>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """One way to run the model: a name and a patch, or None for the model as it is."""

    name: str
    config: PatchConfig | None = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Patch | None]:
        """The model with this variant's patch inside a `with` block."""
        if self.config is None:
            yield None
            return
        with patched(model, self.config) as patch:
            yield patch

    @property
    def acts_in(self) -> list[str]:
        """Phases ("prefill", "decode") in which the patch changes attention."""
        methods = [get_method(c.method)(c) for c in self.config.methods] if self.config else []
        return sorted({p for m in methods if m.points() for p in m.acts_in})

    @property
    def question_in_sparse_part(self) -> bool:
        """Whether a question at the end of a one-shot prompt is prefilled under the patch with its haystack."""
        return "prefill" in self.acts_in

    def to_dict(self) -> dict[str, Any]:
        """Plain data for results.json."""
        return {
            "name": self.name,
            "patch": self.config.to_dict() if self.config else None,
            "acts_in": self.acts_in,
            "question_in_sparse_part": self.question_in_sparse_part,
        }


def parse_value(text: str) -> Any:
    """A setting's value from the command line: JSON where it is JSON, else the text itself."""
    try:
        return load_json(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def parse_settings(pairs: Sequence[str], patch_args: str | None = None) -> dict[str, Any]:
    """`--set name=value` and `--patch-args '{...}'` as one dict. Raises ConfigError."""
    settings: dict[str, Any] = {}
    if patch_args:
        try:
            settings = load_json(patch_args)
        except ValueError as error:
            raise ConfigError(f"--patch-args {patch_args!r:.200} is not valid JSON: {error}.") from error
        if not isinstance(settings, dict):
            raise ConfigError("--patch-args takes a JSON object such as '{\"window\": 512}'.")
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name:
            raise ConfigError(f"--set {pair!r:.200} is not of the form name=value, such as window=512.")
        settings[name.strip()] = parse_value(value.strip())
    return settings


def parse_variants(patches: Sequence[str], settings: Mapping[str, Any] | None = None) -> list[Variant]:
    """`dense` and one variant per spec: `NAME[:key=value,...][+NAME...]`, a config folder or file, or a Hub id.

    `settings` go to every method that knows them. Raises ConfigError, UnknownMethodError.
    """
    settings = dict(settings or {})
    unused = set(settings)
    variants = [Variant(DENSE)]
    for spec in patches:
        variant = _variant(spec, settings, unused)
        if variant.name in {v.name for v in variants}:
            raise ConfigError(f"--patch {spec!r:.200} is there twice; every variant needs its own name or settings.")
        variants.append(variant)
    if unused:
        known = sorted({f.name for v in variants if v.config for m in v.config.methods for f in dataclasses.fields(m)})
        raise ConfigError(
            f"No patch has a setting {min(unused)!r}; "
            + (f"settings are {', '.join(known)}." if known else "name a patch with --patch.")
        )
    return variants


def make_variant(name: str, methods: Sequence[tuple[str, Mapping[str, Any]]]) -> Variant:
    """A variant from method names with their settings, composed in order."""
    return Variant(name, PatchConfig([make_config(n, dict(s)) for n, s in methods]))


def _variant(spec: str, settings: dict[str, Any], unused: set[str]) -> Variant:
    if _is_path(spec):
        if settings:
            unused.clear()
            raise ConfigError(f"Settings go with a method's name; put them into the config {spec!r:.99} instead.")
        try:
            return Variant(_last_part(spec), read_patch(spec))
        except OSError as error:
            raise ConfigError(f"--patch {spec[:80]!r} cannot be read: {error.strerror or error}.") from error
    configs: list[MethodConfig] = []
    labels = []
    for part in spec.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"--patch {spec!r:.200} cannot be read; write NAME, NAME:window=512 or NAME+NAME.")
        name, own = match["name"], _inline(match["settings"] or "", spec)
        cls = type(make_config(name, {}))
        shared = {k: v for k, v in settings.items() if k in cls.takes()}
        unused -= set(shared)
        chosen = {**cls.renewed(shared), **cls.renewed(own)}
        configs.append(make_config(name, chosen))
        labels.append(name + (":" + ",".join(f"{k}={v}" for k, v in chosen.items()) if chosen else ""))
    label = "+".join(labels)
    return Variant(THROUGH if label == DENSE else label, PatchConfig(configs))


def _is_path(spec: str) -> bool:
    """Whether a spec names a file or folder: what looks like one, or is there and is no method's name."""
    head = re.split(r"[:+]", spec, maxsplit=1)[0]
    if _DRIVE.match(spec) or _SLASH.match(spec) or re.search(r"[\\/]", head):
        return True
    return head.endswith(".json") or spec.startswith(".") or _is_there(spec, head)


def _is_there(spec: str, head: str) -> bool:
    """Whether there is such a file or folder; where it begins with a method's name, one with a saved config."""
    path = Path(spec)
    try:
        there, saved = path.exists(), path.is_file() or (path / CONFIG_FILE).is_file()
    except (OSError, ValueError):  # too long for a path, or with a NUL in it
        return False
    if there and head.strip() in (*list_methods(), *list_presets()):
        return saved and head != spec
    return there


def _last_part(path: str) -> str:
    """The name of a file or folder, also of one on another system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def _inline(text: str, spec: str) -> dict[str, Any]:
    settings = {}
    for pair in re.split(r",(?=\s*\w+\s*=)", text) if text else []:
        name, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"--patch {spec!r:.200}: {pair!r:.200} is not of the form name=value.")
        settings[name.strip()] = parse_value(value.strip())
    return settings
