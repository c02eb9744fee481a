"""Several questions about one text: the text is prefilled once, every question goes on from a copy of its cache."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfpatch.runtime.pipeline import FEW
from hfpatch.text.prompt_ids import prompt_ids

from ..errors import EvaluationError
from .answer_nll import answer_ids, kept_logits, with_cache
from .generation import pad_id
from .models import check_positions


class SharedPrompt:
    """A text's cache under the patch that acts now; questions are prompts that begin with that text.

    The text is one prefill; a question is a call of its own after it, long enough to be no decode step, which it
    takes from the text's end where it has to; then come decode steps.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, text: str, prompts: Sequence[str]) -> None:
        self.model, self.tokenizer = model, tokenizer
        rows = [prompt_ids(tokenizer, text), *(prompt_ids(tokenizer, p) for p in prompts)]
        self.tokens = min(_common(rows), *(len(r) - FEW - 1 for r in rows[1:]))
        if self.tokens < 1:
            raise EvaluationError(
                "The text is too short to be asked about after a prefill of its own; raise the length."
            )
        head = torch.tensor([rows[0][: self.tokens]], device=model.device)
        self._cache = getattr(model(head, use_cache=True, **kept_logits(model, 1)), "past_key_values", None)
        if self._cache is None:
            raise EvaluationError("The model gives no cache to go on from; ask every needle by itself.")

    @torch.inference_mode()
    def complete(self, prompt: str, max_new_tokens: int) -> str:
        """The text the model adds to the prompt, greedily. Raises EvaluationError beyond its positions."""
        ids = torch.tensor([prompt_ids(self.tokenizer, prompt)], device=self.model.device)
        check_positions(self.model, ids.shape[1], max_new_tokens)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id(self.model, self.tokenizer),
            **with_cache(self.model, copy.deepcopy(self._cache)),
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    @torch.inference_mode()
    def nll(self, prompt: str, continuation: str, *, steps: bool = False) -> float:
        """Mean negative log-likelihood in nats of the continuation's tokens, each given all before it.

        Question and continuation are one call; with `steps` the continuation is fed token by token.
        """
        ids, start = answer_ids(self.tokenizer, prompt, continuation)
        row = torch.tensor([ids], device=self.model.device)
        cuts = [self.tokens, *(range(start, len(ids)) if steps else [len(ids) - 1])]
        cache, found = copy.deepcopy(self._cache), []
        for begin, end in pairwise(cuts):
            out = self.model(row[:, begin:end], use_cache=True, **with_cache(self.model, cache))
            cache = out.past_key_values
            found.append(out.logits[0, -1:] if steps else out.logits[0, start - 1 - self.tokens :])
        logits: Tensor = torch.cat(found).float()
        return float(torch.nn.functional.cross_entropy(logits, row[0, start:].to(logits.device)))


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    for n, found in enumerate(zip(*rows, strict=False)):
        if len(set(found)) > 1:
            return n
    return min(map(len, rows))
