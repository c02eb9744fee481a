"""Fetches the small models of the tests marked `real` from the Hub: python tests/fetch_models.py FOLDER [NAME ...]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

MODELS = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "qwen05": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "gemma3": "google/gemma-3-270m-it",
}  # fmt: skip
FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def main(words: Sequence[str] | None = None) -> None:
    """Fetch what is not there yet; what could not be fetched is named, with what to do about it."""
    parser = argparse.ArgumentParser(description="Fetch the small models of the tests marked `real` from the Hub.")
    parser.add_argument("folder", type=Path, help="one folder per model is made in it")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(MODELS)}; all by default")
    asked = parser.parse_args(words)
    if unknown := [name for name in asked.names if name not in MODELS]:
        parser.error(f"there is no model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    failed = [name for name in asked.names or MODELS if not fetched(name, asked.folder / name)]
    if failed:
        terms = " Gemma's terms have to be accepted on its page, after `hf auth login`." if "gemma3" in failed else ""
        names = ", ".join(failed)
        sys.exit(
            f"not fetched: {names}. The Hub has to be reached, HF_HUB_OFFLINE unset.{terms} Started again, this goes "
            "on with what is missing."
        )


def fetched(name: str, folder: Path) -> bool:
    """Whether the model is in its folder now."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        print(f"{name}: already in {folder}")
        return True
    try:
        snapshot_download(MODELS[name], local_dir=folder, allow_patterns=FILES)
    except (OSError, ValueError) as error:  # what huggingface_hub raises derives from these
        print(f"{name}: {MODELS[name]} cannot be fetched: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return False
    print(f"{name}: {MODELS[name]} is in {folder}")
    return True


if __name__ == "__main__":
    main()
