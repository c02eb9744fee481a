"""What a patch is made of, as a file: JSON for settings, safetensors for learned tensors."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .config import MethodConfig
from .errors import ConfigError
from .registry import get_method
from .version import __version__

CONFIG_FILE = "hfpatch_config.json"
TENSOR_FILE = "hfpatch_model.safetensors"
logger = logging.get_logger(__name__)


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split(".")[:3] if p.isdigit())


@dataclass
class PatchConfig:
    """What is patched and how: the methods in order, and the tensors some of them learned.

    Saved as `hfpatch_config.json` and, if there are tensors, `hfpatch_model.safetensors`.
    """

    methods: list[MethodConfig]
    base_model_name_or_path: str | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

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
        extra = sorted(set(data) - {"hfpatch_version", "base_model_name_or_path", "methods"})
        newer = _version_tuple(str(data.get("hfpatch_version", "0"))) > _version_tuple(__version__)
        if extra and not newer:
            raise ConfigError(f"{where}: there is no setting {extra[0]!r}.")
        if extra:
            logger.warning("%s: settings from a newer hfpatch are ignored: %s", where, ", ".join(extra))
        methods = []
        for entry in data["methods"]:
            if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
                raise ConfigError(f"{where}: every entry of 'methods' needs a 'method' name.")
            methods.append(get_method(entry["method"]).config_class.from_dict(entry, newer=newer))
        return cls(methods, data.get("base_model_name_or_path"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the config, and the tensors if there are any, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        if self.tensors:
            from safetensors.torch import save_file

            save_file({k: t.detach().cpu().contiguous() for k, t in self.tensors.items()}, folder / TENSOR_FILE)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None) -> "PatchConfig":
        """Config from a folder, a JSON file or a Hub repository. Raises ConfigError."""
        path = Path(name_or_path)
        if path.is_file():
            file, folder = path, path.parent
        else:
            folder = path if path.is_dir() else _download(str(name_or_path), revision)
            file = folder / CONFIG_FILE
        if not file.is_file():
            raise ConfigError(f"{folder} holds no {CONFIG_FILE}; save one with get_patch(model).save_pretrained(...).")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not valid JSON: {error}.") from error
        config = cls.from_dict(data, where=str(file))
        if (folder / TENSOR_FILE).is_file():
            from safetensors.torch import load_file

            config.tensors = load_file(folder / TENSOR_FILE)
        return config

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the config to the Hub repository `repo_id`, creating it if needed; returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload hfpatch config")
        return str(url)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG_FILE, TENSOR_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{repo_id!r} is neither a folder, a JSON file nor a reachable Hub repository ({type(error).__name__})."
        ) from error
