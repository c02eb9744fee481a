"""A patch in a folder: settings and tensors, always those of one save.

The config names its tensors by their SHA-256 and is replaced last; until then the new tensors wait beside the old
ones, under a name made of that digest. At whatever moment a save is cut off, the folder holds the old patch or the
new one.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from ..errors import ConfigError, SaveError, reason
from ..files.json_text import read_json
from ..values import shown_path

CONFIG_FILE = "hfpatch_config.json"
TENSOR_FILE = "hfpatch_model.safetensors"
DIGEST = "tensors_sha256"
_WAITING = f".{TENSOR_FILE}."
_CHUNK = 1 << 20
logger = logging.get_logger(__name__)


def write(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace what `folder` holds by a config and its tensors. Raises SaveError, with the patch of before whole."""
    waiting = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before, digest = _named(folder), None
        if tensors:
            with _new_file(folder) as new:
                digest = _write_tensors(new, tensors)
                waiting = folder / (_WAITING + digest)
                os.replace(new, waiting)
        with _new_file(folder) as new:
            new.write_text(json.dumps({**data, DIGEST: digest}, indent=2) + "\n", encoding="utf-8")
            _flush(new)
            _flush(folder)
            os.replace(new, folder / CONFIG_FILE)
        _settle(folder, digest, before)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        named = _named(folder)
        if waiting is not None and waiting.name != _WAITING + str(named):
            with suppress(OSError):
                waiting.unlink(missing_ok=True)
        raise SaveError(
            f"{shown_path(folder)} cannot be written ({reason(error)}); make room or choose another folder. The patch "
            "it held before is whole, unless the new one has taken its place."
        ) from error


def _named(folder: Path) -> str | None:
    """The digest of the tensors that belong to the config in `folder`; None without any."""
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    digest = data.get(DIGEST) if isinstance(data, dict) else None
    return digest if _is_digest(digest) else None


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


@contextmanager
def _new_file(folder: Path) -> Iterator[Path]:
    """A name for a file in `folder` that is to take another's place; gone at the end if it has not."""
    new = folder / f".hfpatch-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        yield new
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def _write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    from safetensors.torch import save_file

    own = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    file.touch()
    mode = file.stat().st_mode
    save_file(own, file)
    file.chmod(mode)  # the library makes files that are for their owner alone
    _flush(file)
    return _digest(file)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have a file's contents, or a folder's list of files where the system can, on the disk."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():
        number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _settle(folder: Path, digest: str | None, before: str | None) -> None:
    """Put the tensors of the config just written in their place, and drop those that waited for the one before."""
    target = folder / TENSOR_FILE
    _flush(folder)
    if digest is None:
        target.unlink(missing_ok=True)
    else:
        try:
            os.replace(folder / (_WAITING + digest), target)
        except FileNotFoundError:  # another process that saved the same tensors may have done it
            if _digest(target) != digest:
                raise
    if before is not None:
        (folder / (_WAITING + before)).unlink(missing_ok=True)


def read(file: Path, tries: int = 4) -> tuple[Any, dict[str, torch.Tensor]]:
    """The plain data of a config file and the tensors of the same save. Raises ConfigError.

    What does not belong together is looked at again `tries` times: another process may be saving the same patch.
    """
    data = read_json(file)
    if not isinstance(data, dict) or DIGEST not in data:  # written by hand: what lies beside it is its own
        return data, load_tensors(file.parent / TENSOR_FILE) if os.path.lexists(file.parent / TENSOR_FILE) else {}
    digest, folder = data[DIGEST], file.parent
    if digest is None:
        if os.path.lexists(folder / TENSOR_FILE):
            logger.warning("%s is left over from an earlier save and is ignored", folder / TENSOR_FILE)
        return data, {}
    if not _is_digest(digest):
        raise ConfigError(f"{shown_path(file)}: {DIGEST} is not the SHA-256 of a file in hexadecimal digits.")
    places = (folder / TENSOR_FILE, folder / (_WAITING + digest))
    tensors = next((held for place in places if (held := _held(place, digest)) is not None), None)
    again = read_json(file)
    if not isinstance(again, dict) or again.get(DIGEST) != digest:
        return read(file, tries)  # another process saved in between
    if tensors is None and tries:
        return read(file, tries - 1)
    if tensors is None:
        raise ConfigError(
            f"{shown_path(folder / TENSOR_FILE)} is missing or of another save than {file.name}; save the patch "
            f"again, or take {DIGEST} out of the config if the two belong together."
        )
    return data, tensors


def _held(place: Path, digest: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a file with this digest; None if it is not there, or no longer."""
    try:
        return load_tensors(place) if place.is_file() and _digest(place) == digest else None
    except (OSError, ConfigError) as error:
        if place.is_file():
            raise ConfigError(f"{shown_path(place)} cannot be read ({reason(error)}).") from error
        return None


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises ConfigError."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise ConfigError(f"{shown_path(file)} is not a file.")
    try:
        return load_file(file)
    except Exception as error:  # whatever a hostile file makes of the library
        raise ConfigError(f"{shown_path(file)} is not a readable safetensors file ({reason(error)}).") from error
