"""Saved patch configs, with the line of what is wrong in them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfpatch import MethodConfig, PatchConfig, get_method
from hfpatch.config.old_names import unwarned
from hfpatch.config.patch_config import CONFIG_FILE, FIELDS
from hfpatch.config.registry import make_config
from hfpatch.errors import HfpatchError
from hfpatch.files.located import Located, Where, read


def read_patch(name_or_path: str) -> PatchConfig:
    """A patch config from a folder, a JSON file or the Hub. Raises FileError with file and line for local files."""
    path = Path(name_or_path)
    file = path / CONFIG_FILE if os.path.isdir(path) else path
    if os.path.isfile(file):
        with unwarned():
            check_patch(read(file))
    return PatchConfig.from_pretrained(name_or_path)


def check_patch(found: Located) -> None:
    """Raise FileError at the first thing wrong in a patch config."""
    data = found.data
    if not isinstance(data, dict) or not isinstance(data.get("methods"), list) or not data["methods"]:
        raise found.error(("methods",), "a patch config is an object with a non-empty list under 'methods'.")
    for n, entry in enumerate(data["methods"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
            raise found.error(("methods", n), "every entry of 'methods' needs a 'method' name.")
        settings = {k: v for k, v in entry.items() if k != "method"}
        try:
            cls = get_method(entry["method"]).config_class
        except HfpatchError as error:
            raise found.error(("methods", n, "method"), str(error)) from error
        newer = isinstance(data.get("hfpatch_version"), str)
        _check_settings(found, ("methods", n), cls, settings, strict=not newer)
    try:
        PatchConfig.from_dict(data, where="this patch config")
    except HfpatchError as error:
        extra = sorted(set(data) - FIELDS)
        raise found.error((extra[0],) if extra else ("methods",), str(error)) from error


def checked_config(
    found: Located, named_at: Where, set_at: Where, method: str, settings: Mapping[str, Any]
) -> MethodConfig:
    """Config of a method or preset named at one place and set at another. Raises FileError at the one to blame."""
    try:
        preset = make_config(method, {})
    except HfpatchError as error:
        raise found.error(named_at, str(error)) from error
    with unwarned():
        _check_settings(found, set_at, type(preset), settings, strict=True)
    try:
        return make_config(method, dict(settings))
    except HfpatchError as error:
        raise found.error(set_at, str(error)) from error


def _check_settings(
    found: Located, where: Where, cls: type[MethodConfig], settings: Mapping[str, Any], *, strict: bool
) -> None:
    try:
        cls.from_dict(dict(settings), newer=not strict)
    except HfpatchError as whole:
        for key, value in settings.items():
            try:
                cls.from_dict({key: value}, newer=not strict)
            except HfpatchError as error:
                raise found.error((*where, key), str(error)) from error
        raise found.error(where, str(whole)) from whole
