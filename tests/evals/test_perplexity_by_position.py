"""Perplexity by position: the loss of each token, and the buckets it is put into."""

from types import SimpleNamespace

import pytest
import torch
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.tasks import PerplexityByPosition, Sample, get_task
from hfpatch.evals.tasks.perplexity import token_nll
from test_tasks import word_tokenizer


class Uniform(torch.nn.Module):
    """Predicts every byte alike, but the token 7 with certainty after position 100."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, 32)
        logits[:, 100:, 7] = 60.0
        return SimpleNamespace(logits=logits)


def test_nll_by_position():
    nll = token_nll(Uniform(), torch.full((1, 201), 7))
    assert torch.allclose(nll[:100], torch.tensor(32.0).log())
    assert torch.allclose(nll[100:], torch.zeros(100), atol=1e-5)


def test_perplexity_by_position_in_buckets():
    task = get_task("perplexity_by_position")
    assert isinstance(task, PerplexityByPosition)
    tokenizer = word_tokenizer()
    model = Uniform()
    samples = task.samples(tokenizer, 300, 3)
    found = task.measure(model, tokenizer, samples, buckets=4)
    assert [b.start for b in found[1:]] == [b.stop for b in found[:-1]]
    assert (found[0].start, found[-1].stop) == (1, max(s.meta["length"] for s in samples))
    assert sum(b.tokens for b in found) == sum(s.meta["length"] - 1 for s in samples)
    assert found[0].perplexity == pytest.approx(32.0, rel=1e-4)
    assert found[-1].nll == pytest.approx(60.0, rel=1e-4)
    with pytest.raises(EvaluationError, match="call measure"):
        task.score("x", Sample("", []))
    with pytest.raises(EvaluationError, match="no samples"):
        task.measure(model, tokenizer, [])
