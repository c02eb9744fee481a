"""What a patch is made of, as a file: JSON for settings, safetensors for learned tensors."""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..errors import ConfigError
from ..values import shown, shown_path
from ..version import __version__
from . import hub
from .method_config import MethodConfig
from .patch_store import CONFIG_FILE, DIGEST, TENSOR_FILE, read, write
from .registry import get_method

FILES = [CONFIG_FILE, TENSOR_FILE]
FIELDS = frozenset({"hfpatch_version", "base_model_name_or_path", "methods", DIGEST})
_VERSION = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,9}))?(?:\.([0-9]{1,9}))?(?![0-9])[0-9A-Za-z.+-]{0,80}")
_KEY = re.compile(r"(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
logger = logging.get_logger(__name__)


def _version_tuple(text: Any, where: str) -> tuple[int, ...]:
    match = _VERSION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"{where}: hfpatch_version={shown(text)} is not a version such as {__version__!r}.")
    return tuple(int(part or 0) for part in match.groups())


def _name(name: Any, what: str) -> str:
    text = os.fspath(name) if isinstance(name, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{what} is named by text or a Path, not by {shown(name)}.")
    return text


@dataclass
class PatchConfig:
    """What is patched and how: the methods in order, and the tensors some of them learned.

    Tensors are named `<place of the method>.<name>`, such as "0.gamma". Saved as `hfpatch_config.json` and, if there
    are tensors, `hfpatch_model.safetensors`. Raises ConfigError.
    """

    methods: list[MethodConfig]
    base_model_name_or_path: str | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        methods, name = self.methods, self.base_model_name_or_path
        whole = isinstance(methods, (list, tuple)) and all(isinstance(m, MethodConfig) for m in methods)
        if not whole or not methods:
            raise ConfigError(f"A patch config takes a non-empty list of method configs, not {shown(methods)}.")
        self.methods = list(methods)
        if name is not None:
            self.base_model_name_or_path = _name(name, "The base model of a patch config")

    def tensors_by_method(self) -> list[dict[str, torch.Tensor]]:
        """The tensors of each method under their own names. Raises ConfigError for one that belongs to none."""
        if not isinstance(self.tensors, Mapping):
            raise ConfigError(f"A patch config's tensors are a dict by name, not {shown(self.tensors)}.")
        own: list[dict[str, torch.Tensor]] = [{} for _ in self.methods]
        for key, value in self.tensors.items():
            match = _KEY.fullmatch(key) if isinstance(key, str) else None
            if match is None or int(match[1]) >= len(own):
                raise ConfigError(
                    f"The tensor {shown(key)} belongs to none of the {len(own)} methods of the patch; names are the "
                    "method's place from 0 on, a dot and the method's name for it, such as '0.gamma'."
                )
            if not isinstance(value, torch.Tensor):
                raise ConfigError(f"{shown(key)} of a patch config is {shown(value)}, not a tensor.")
            own[int(match[1])][match[2]] = value
        return own

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the JSON file; tensors are not part of it."""
        return {
            "hfpatch_version": __version__,
            "base_model_name_or_path": self.base_model_name_or_path,
            "methods": [m.to_dict() for m in self.methods],
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "patch config") -> "PatchConfig":
        """Config from plain data. Raises ConfigError, UnknownMethodError."""
        if not isinstance(data, dict) or not isinstance(data.get("methods"), list) or not data["methods"]:
            raise ConfigError(f"{where}: expected an object with a non-empty list under 'methods'.")
        extra = sorted(shown(k) for k in data if k not in FIELDS)
        version = data.get("hfpatch_version") or __version__
        newer = _version_tuple(version, where) > _version_tuple(__version__, where)
        if extra and not newer:
            raise ConfigError(f"{where}: there is no setting {extra[0]}.")
        if extra:
            logger.warning("%s: settings from a newer hfpatch are ignored: %s", where, ", ".join(extra))
        methods = []
        for entry in data["methods"]:
            if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
                raise ConfigError(f"{where}: every entry of 'methods' needs a 'method' name.")
            methods.append(get_method(entry["method"]).config_class.from_dict(entry, newer=newer))
        return cls(methods, data.get("base_model_name_or_path"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the config, and the tensors if there are any, into `folder`, all or nothing.

        Raises ConfigError, and SaveError when the folder cannot be written.
        """
        self.tensors_by_method()
        write(Path(_name(folder, "A folder to save in")), self.to_dict(), self.tensors)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None) -> "PatchConfig":
        """Config from a folder, a JSON file or a Hub repository. Raises ConfigError."""
        name = _name(name_or_path, "A patch config")
        path = Path(name)
        if not _is(Path.is_file, path):
            folder = path if _is(Path.is_dir, path) else hub.download(name, revision, FILES)
            path = folder / CONFIG_FILE
            if not path.is_file():
                raise ConfigError(
                    f"{shown_path(folder)} holds no {CONFIG_FILE}; save one with "
                    "get_patch(model).save_pretrained(...)."
                )
        data, tensors = read(path)
        config = cls.from_dict(data, where=shown_path(path))
        config.tensors = tensors
        config.tensors_by_method()
        return config

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the config to the Hub repository `repo_id`, creating it if needed; returns its address.

        Raises ConfigError, SaveError.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            stale = None if self.tensors else TENSOR_FILE
            return hub.upload(folder, repo_id, private=private, token=token, delete=stale)


def _is(kind: Any, path: Path) -> bool:
    """Whether a path is a file or folder; a name the system cannot have is neither."""
    try:
        return bool(kind(path))
    except (OSError, ValueError):
        return False
