"""Patches on the Hub: folders down and up, with errors of our own."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError, SaveError, reason
from ..values import shown


def download(repo_id: str, revision: str | None, files: list[str]) -> Path:
    """The folder that holds these files of a Hub repository. Raises ConfigError."""
    from huggingface_hub import snapshot_download

    if revision is not None and not isinstance(revision, str):
        raise ConfigError(f"revision={shown(revision)} is not the name of a branch, a tag or a commit.")
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # names, rights, networks: the Hub's client passes on what its libraries raise
        raise ConfigError(
            f"{shown(repo_id)} is neither a folder, a JSON file nor a reachable Hub repository "
            f"({type(error).__name__})."
        ) from error


def upload(folder: str, repo_id: str, *, private: bool | None, token: str | None, delete: str | None) -> str:
    """Commit a folder's files to a Hub repository, made if needed, less the file `delete`; returns its address.

    Raises ConfigError, SaveError.
    """
    from huggingface_hub import HfApi

    if not isinstance(repo_id, str):
        raise ConfigError(f"A Hub repository is named by text such as 'name/repo', not by {shown(repo_id)}.")
    api, more = HfApi(token=token), dict[str, Any](delete_patterns=delete) if delete else {}
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload hfpatch config", **more)
    except Exception as error:  # as above
        raise SaveError(f"{shown(repo_id)} cannot be uploaded ({reason(error)}).") from error
    return str(url)
