"""Models in one GGUF file: where the file is, and what Transformers' loaders have to be told about it."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError, ModelNotFoundError

SUFFIX = ".gguf"
NEEDED = ("gguf", "sentencepiece", "accelerate")


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` is given: a folder or Hub id, and the GGUF file in it, if the model is one."""

    name: str
    file: str | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """For the loaders of config and tokenizer."""
        return {} if self.file is None else {"gguf_file": self.file}

    @property
    def model_keywords(self) -> dict[str, Any]:
        """For the loader of the model: weights of a GGUF file are unpacked, as patches and gradients expect."""
        if self.file is None:
            return {}
        try:
            from transformers import GgufConfig
        except ImportError:  # a release that always unpacks them
            return self.keywords
        return {**self.keywords, "quantization_config": GgufConfig(dequantize=True)}


def find_source(name: str) -> Source:
    """Where MODEL lies. Raises ModelNotFoundError, EvaluationError where packages that read GGUF files are missing."""
    try:
        path = Path(name)
        if path.suffix == SUFFIX:
            if not path.is_file():
                raise ModelNotFoundError(f"There is no file {name!r:.200}; name a GGUF file or a model folder.")
            return _readable(path)
        if not path.is_dir() or (path / "config.json").is_file():
            return Source(name)
        files = sorted(path.glob(f"*{SUFFIX}"))
    except (OSError, ValueError):  # too long for a path, or with a NUL in it
        return Source(name)
    if len(files) > 1:
        listed = ", ".join(f.name for f in files)
        raise ModelNotFoundError(f"{name!r:.200} holds several GGUF files; name one of them: {listed:.200}.")
    return _readable(files[0]) if files else Source(name)


def _readable(path: Path) -> Source:
    for package in NEEDED:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise EvaluationError(
                f"Reading {path.name!r:.80} needs {package}; run `pip install 'hfpatch[gguf]'`."
            ) from error
    return Source(str(path.parent), path.name)
