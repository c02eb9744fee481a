"""Greedy completions of a batch of prompts, left-padded with a mask."""

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hfpatch.text.prompt_ids import prompt_ids
from hfpatch.text.sources import sentences

from .models import Loaded, check_positions


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `[B, L]`, real tokens on the right."""
    length = max(len(r) for r in rows)
    ids = torch.tensor([[pad] * (length - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def pad_id(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; it is masked, so any will do."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.get_text_config().eos_token_id):
        if isinstance(value, list):
            value = value[0]
        if value is not None:
            return int(value)
    return 0


@torch.inference_mode()
def complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The text the model adds to each prompt, greedily, in one batch. Raises EvaluationError beyond its positions."""
    pad = pad_id(model, tokenizer)
    ids, mask = pad_left([prompt_ids(tokenizer, p) for p in prompts], pad)
    check_positions(model, ids.shape[1], max_new_tokens)
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def generate_tokens(loaded: Loaded, ids: torch.Tensor, new_tokens: int, streamer: Any = None) -> torch.Tensor:
    """Exactly `new_tokens` greedy tokens after `ids [B, L]`, whatever they are."""
    return loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=pad_id(loaded.model, loaded.tokenizer),
        streamer=streamer,
    )


def text_ids(loaded: Loaded, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids `[1, length]` of consecutive prose, on the model's device."""
    source = sentences("prose", random.Random(f"latency-{seed}"))
    words: list[str] = []
    ids: list[int] = []
    while len(ids) < length:
        words += islice(source, max(32, length // 16))
        ids = prompt_ids(loaded.tokenizer, " ".join(words))
    return torch.tensor([ids[:length]], device=loaded.device)
