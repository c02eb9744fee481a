"""Scores of context tokens from the question rows of one layer's attention."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


class Seen(Exception):
    """Every question has been looked at: the layers above are not needed."""


@dataclass(frozen=True)
class QuestionView:
    """Where the question's tokens look: `weights [nq, T]`, softmax weights of the last nq rows summed over heads."""

    weights: Tensor

    @property
    def nq(self) -> int:
        """Question tokens."""
        return self.weights.shape[0]

    def question_weights(self) -> Tensor:
        """Weight of each question token, `[nq]`: its attention to the question itself."""
        return self.weights[:, -self.nq :].sum(-1)

    def token_scores(self, start: int, stop: int, phrase: int, question: Tensor | None) -> Tensor:
        """Scores `[stop - start]` of the context tokens in columns `start..stop`.

        Sum over question rows of their squared weight times the attention mass of `phrase` neighbouring tokens,
        `j - phrase // 2 .. j + (phrase - 1) // 2`; `question [nq]` are the weights, all one when None.
        """
        rows = self.weights[:, start:stop]
        total = rows.sum(0) if question is None else (question.square()[:, None] * rows).sum(0)
        phrase = min(phrase, 2 * len(total))  # every token's neighbours are then all of them
        padded = F.pad(total, (phrase // 2, (phrase - 1) // 2))
        return padded.unfold(0, phrase, 1).sum(-1)


def question_view(
    q: Tensor, k: Tensor, nq: int, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> QuestionView:
    """Attention of the last `nq` queries of `q [Hq, Lq, D]` over `k [Hkv, T, D]`, in float32, summed over heads."""
    hq, hkv, total = q.shape[0], k.shape[0], k.shape[1]
    rows = q[:, -nq:].float().reshape(hkv, hq // hkv * nq, -1)
    logits = (scale * rows @ k.float().transpose(1, 2)).reshape(hq, nq, total)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    i = torch.arange(total - nq, total, device=q.device)[:, None]
    logits = logits.masked_fill(torch.arange(total, device=q.device) > i, float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[:, None, None])
    return QuestionView((logits - lse).exp().sum(0))
