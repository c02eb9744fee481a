"""Scores of context tokens from the question rows of one layer's attention."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ...core.call import AttentionCall
from ...core.logits import causal, logits, weights


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


def question_view(call: AttentionCall, row: int, nq: int) -> QuestionView:
    """Attention of a row's last `nq` queries over all its keys, in float32, summed over heads."""
    q, k = call.q[row : row + 1, :, -nq:].float(), call.k[row : row + 1].float()
    bias = None if call.bias is None else call.bias[row : row + 1] if len(call.bias) > 1 else call.bias
    every = logits(q, k, scale=call.scale, softcap=call.softcap, bias=bias)
    seen = weights(causal(every, call.q_pos[-nq:], call.k_pos), call.sinks)  # [1, Hq, nq, T]
    return QuestionView(seen[0].sum(0))
