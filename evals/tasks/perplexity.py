"""Perplexity by position: how well held-out prose is predicted early and late in the context."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hfpatch.text.prompt_ids import prompt_ids
from hfpatch.text.sources import sentences

from ..errors import EvaluationError
from .base import Sample, Task
from .layout import compose

_ROWS = 1024


@dataclass(frozen=True)
class Bucket:
    """Predicted tokens at positions `start..stop`: how many over all samples, and their mean NLL in nats."""

    start: int
    stop: int
    tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL."""
        return math.exp(self.nll)


class PerplexityByPosition(Task):
    """Its samples are stretches of prose without a question; `measure` takes the place of `score`."""

    def __init__(self) -> None:
        super().__init__(
            "perplexity_by_position", "negative log-likelihood of prose by position", {"haystack": "prose"}, 0
        )

    def score(self, text: str, sample: Sample) -> float:
        raise EvaluationError(
            f"{self.name} is measured on the prompts themselves; call measure(model, tokenizer, ...)."
        )

    def measure(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], buckets: int = 8
    ) -> list[Bucket]:
        """NLL in `buckets` ranges of positions of about equal width, over all samples. One forward per sample."""
        rows = [token_nll(model, torch.tensor([prompt_ids(tokenizer, s.prompt)])) for s in samples]
        if not rows:
            raise EvaluationError(f"{self.name}: there are no samples to measure.")
        longest = max(len(row) for row in rows)
        edges = [round(longest * k / buckets) for k in range(buckets + 1)]
        found = []
        for start, stop in pairwise(edges):
            part = torch.cat([row[start:stop] for row in rows])
            if len(part):
                found.append(Bucket(start + 1, stop + 1, len(part), float(part.mean())))
        return found

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, index: int, options: dict[str, Any]
    ) -> Sample:
        haystack = str(options["haystack"])
        found = compose(tokenizer, [], [], sentences(haystack, self.rng(seed, index, "haystack")), length)
        meta = {
            "task": self.name, "length": found.tokens, "requested": length, "haystack": haystack, "seed": seed,
            "index": index, "question_in_sparse_part": True,
        }  # fmt: skip
        return Sample(found.prompt, [], meta)


@torch.inference_mode()
def token_nll(model: nn.Module, ids: Tensor) -> Tensor:
    """NLL in nats of the tokens 1..L-1 of `ids [1, L]`, each given those before it; `[L - 1]`, float32, on the CPU."""
    device = next(model.parameters()).device
    ids = ids.to(device)
    logits = model(ids, use_cache=False).logits[0, :-1]
    told = ids[0, 1:].to(logits.device)
    parts = [
        nn.functional.cross_entropy(logits[a : a + _ROWS].float(), told[a : a + _ROWS], reduction="none")
        for a in range(0, len(told), _ROWS)
    ]
    return torch.cat(parts).cpu() if parts else torch.empty(0)
