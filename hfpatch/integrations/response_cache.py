"""What the answers of a model under lm-eval depend on, as a key to its cache of responses."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import Patch
from ..errors import ConfigError
from ..version import __version__

SETTINGS = (
    "backend", "max_length", "truncation", "add_bos_token", "prefix_token_id", "eot_token_id", "softmax_dtype",
    "mixed_precision_dtype", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip

ORIGIN = ("pretrained", "revision", "peft", "delta")  # where weights come from that are offloaded, so not here to read


class ResponseKey:
    """Tells the responses of one model under one patch from all others, whatever file they lie in."""

    def __init__(self, lm: Any, strict: bool) -> None:
        weights = {**dict(lm.model.named_parameters()), **dict(lm.model.named_buffers())}
        elsewhere = any(t.device.type == "meta" for t in weights.values())
        self._model = _digest(
            __version__, strict, {name: str(getattr(lm, name, None)) for name in SETTINGS},
            _plain(lm.model.config), _plain(getattr(lm.model, "generation_config", None)),
            str(getattr(lm.model.config, "_attn_implementation", None)), _tokenizer(lm.tokenizer),
            tensors_digest(weights), [str(getattr(lm, name, None)) for name in ORIGIN if elsewhere],
        )  # fmt: skip
        self._patch: tuple[Patch | None, str] = (None, "none")

    def of(self, patch: Patch | None, key: str) -> str:
        """The key of a request under a patch: its methods, settings and learned tensors, not where they came from."""
        if patch is not self._patch[0]:
            self._patch = (patch, "none" if patch is None else patch_digest(patch))
        return f"{self._model}-{self._patch[1]}-{key}"


def patch_digest(patch: Patch) -> str:
    """Digest of what a patch does."""
    config = patch.config
    return _digest([m.to_dict() for m in config.methods], tensors_digest(config.tensors))


def keep_apart(responses: Any, key: Any) -> None:
    """Make lm-eval's store of responses (a SqliteDict) look every request up under `key(request)`."""
    if not hasattr(responses, "encode_key"):
        raise ConfigError("--use_cache needs sqlitedict 2 or newer; run `pip install -U 'sqlitedict>=2'`.")
    responses.encode_key = key


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Digest of names, kinds and contents; tensors without content here (meta) count by name and shape."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        for part in _flat(tensors[name]):
            found.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            if part.device.type != "meta":
                found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _flat(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or the tensors a quantized or distributed one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _flat(getattr(tensor, name))


def _tokenizer(tokenizer: Any) -> Any:
    """What decides the token ids; padding and truncation are set anew with every call."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return {k: v for k, v in json.loads(core.to_str()).items() if k not in ("padding", "truncation")}


def _plain(config: Any) -> Any:
    """A config without the name it was loaded by."""
    return {k: v for k, v in config.to_dict().items() if k != "_name_or_path"} if config is not None else None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
