"""MODEL arguments: a folder, a GGUF file, a Hub id, or `embedded`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfpatch.errors import ConfigError, UnsupportedModelError
from hfpatch.runtime.positions import position_limit, position_table

from ..errors import EvaluationError, ModelNotFoundError
from .gguf import Source, find_source

EMBEDDED = "embedded"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer and the name it was asked for by."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        return torch.device(self.model.device)

    def describe(self) -> dict[str, Any]:
        """Plain data for results.json."""
        config = self.model.config.get_text_config()
        names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_positions": getattr(config, "max_position_embeddings", None),
            **{n: getattr(config, n, None) for n in names},
        }


def pick_device(device: str | None) -> str:
    """The device named, or the accelerator if there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"There is no device {device!r}; write cpu, cuda or cuda:0.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device here; use --device cpu.")
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each kind of device has its own way of not being there; 'meta' holds no numbers
        raise ConfigError(f"device {device!r} cannot be used on this machine; write cpu, cuda or cuda:0.") from error
    return device


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> Loaded:
    """Load MODEL for inference. Raises ModelNotFoundError, UnsupportedModelError."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    where = pick_device(device)
    if name == EMBEDDED:
        model, tokenizer = _load_embedded(dtype)
    else:
        source = find_source(name)
        model = _from_pretrained(source, "auto" if dtype == "auto" else getattr(torch, dtype))
        tokenizer = _tokenizer(source)
    found: Any = model
    return Loaded(name, found.to(where).eval(), tokenizer)


def check_length(loaded: Loaded, length: int, new_tokens: int = 0, *, asked: int = 0) -> None:
    """Raise EvaluationError when the model has no positions for a prompt of so many tokens and its answer.

    Positions that are computed, as in RoPE, may be exceeded by the answer, not by the prompt. `asked`: tokens of the
    question, where `length` does not count them.
    """
    limit = position_limit(loaded.model)
    if limit and length + asked > limit:
        told = f" and {asked} for the question" if asked else ""
        raise EvaluationError(f"{loaded.name} has positions for {limit} tokens; {length}{told} are too many.")
    check_positions(loaded.model, length + asked, new_tokens, loaded.name)


def check_positions(model: Any, tokens: int, new_tokens: int, name: str = "") -> None:
    """Raise EvaluationError when the model's table of positions, if it has one, ends before the answer does."""
    table = position_table(model)
    if table is not None and tokens + max(new_tokens - 1, 0) > table:
        raise EvaluationError(
            f"{name or type(model).__name__} has a table of {table} positions; {tokens} tokens and {new_tokens} for "
            f"the answer are too many, ask for {max(table - new_tokens + 1, 0)} at most."
        )


def load_skeleton(name: str) -> PreTrainedModel:
    """The model without its weights, on the meta device, from its config alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    source = Source(str(_checkpoint())) if name == EMBEDDED else find_source(name)
    config = _config(source)
    with torch.device("meta"):
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
            if type(config) in auto._model_mapping:
                return auto.from_config(config)
    raise UnsupportedModelError(
        f"{name!r} is a {config.model_type} model, which generates no text; use a causal language model."
    )


def _load_embedded(dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from .. import testbed

    _checkpoint()
    return testbed.load(torch.float32 if dtype == "auto" else getattr(torch, dtype))


def _checkpoint() -> Path:
    from ..testbed import CHECKPOINT

    if not (CHECKPOINT / "config.json").is_file():
        raise ModelNotFoundError("This installation carries no embedded model; reinstall hfpatch or name another.")
    return CHECKPOINT


def _config(source: Source) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.name, **source.keywords)
    except (OSError, ValueError) as error:
        raise _not_found(source, error) from error


def _from_pretrained(source: Source, dtype: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = _config(source)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    try:
        return auto.from_pretrained(source.name, config=config, dtype=dtype, **source.model_keywords)
    except (OSError, ValueError) as error:
        raise _not_found(source, error) from error


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.name, **source.keywords)
    except (OSError, ValueError) as error:
        raise _not_found(source, error, "the tokenizer of ") from error


def _not_found(source: Source, error: Exception, part: str = "") -> ModelNotFoundError:
    reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
    name = source.name if source.file is None else str(Path(source.name) / source.file)
    return ModelNotFoundError(
        f"Cannot load {part + name!r}: give a model folder, a GGUF file, a Hub id that can be reached, or 'embedded' "
        f"({reason:.200})."
    )
