"""How likely the right answer is to a model: far more telling than hits, which ten samples can hardly tell apart."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfpatch.text.prompt_ids import prompt_ids


@torch.inference_mode()
def answer_nll(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, *, steps: bool = False
) -> float:
    """Mean negative log-likelihood in nats of the continuation's tokens, each given the prompt and those before it.

    Prompt and answer go through one forward pass without a cache. With `steps` the prompt is prefilled and the answer
    fed token by token: what a patch that acts in decoding alone would do to it.
    """
    ids, start = answer_ids(tokenizer, prompt, continuation)
    row = torch.tensor([ids], device=model.device)
    logits = (_by_steps if steps else _at_once)(model, row, start).float()
    return float(torch.nn.functional.cross_entropy(logits, row[0, start:].to(logits.device)))


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of prompt and continuation, and where they begin to differ from the prompt's alone."""
    ids, begun = prompt_ids(tokenizer, prompt + continuation), prompt_ids(tokenizer, prompt)
    same = [a == b for a, b in zip(ids, begun, strict=False)]
    return ids, min(same.index(False) if False in same else len(same), len(ids) - 1)


def _at_once(model: Any, row: Tensor, start: int) -> Tensor:
    """Logits `[N, V]` of the N tokens from `start` on."""
    told = row.shape[1] - start
    out = model(row, use_cache=False, **kept_logits(model, told + 1)).logits
    return out[0, -told - 1 : -1]


def _by_steps(model: Any, row: Tensor, start: int) -> Tensor:
    out = model(row[:, :start], use_cache=True, **kept_logits(model, 1))
    found = [out.logits[0, -1]]
    for n in range(start, row.shape[1] - 1):
        out = model(row[:, n : n + 1], use_cache=True, **with_cache(model, out.past_key_values))
        found.append(out.logits[0, -1])
    return torch.stack(found)


def kept_logits(model: Any, rows: int) -> dict[str, int]:
    """Logits of the last rows alone, where the model can: all of them may be larger than its weights."""
    return {"logits_to_keep": rows} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The cache under the name that the model's calls give it, which depends on the release of Transformers."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
