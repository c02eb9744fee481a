"""A model that only generates: scored by what it says, without likelihoods; and names of the last version."""

import importlib
from typing import Any

import pytest
import torch
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.cells import Cell, Session
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.run.variants import Variant
from hfpatch.evals.testbed import load
from torch import Tensor
from transformers import LlamaConfig


class Teller:
    """It answers what it is told to."""

    def __init__(self, tokenizer: Any, answer: str) -> None:
        self.config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096)
        self.device, self.tokenizer, self.answer = torch.device("cpu"), tokenizer, answer

    def generate(self, ids: Tensor, **more: Any) -> Tensor:
        told = self.tokenizer(self.answer, add_special_tokens=False)["input_ids"]
        return torch.cat([ids, torch.tensor([told] * len(ids))], 1)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("answer,score", [(" {}.", 1.0), (" 9{}.", 0.0)])
def test_it_has_scores_and_no_likelihoods(answer: str, score: float, together: bool) -> None:
    _, tokenizer = load()
    job = NiahJob([512], depths=(50,), samples=1, together=together)
    (sample,) = job.build(Loaded("teller", None, tokenizer), 512, 0)
    assert sample.tokens is not None and abs(sample.tokens - 512) < 9
    session = Session("teller", [Variant("dense")])
    session.__dict__["loaded"] = Loaded("teller", Teller(tokenizer, answer.format(sample.value)), tokenizer)
    result = job.run(Cell("niah", "dense", 512), session)
    found = result.data
    assert "of the one prompt" in result.samples[0]["question_place"]
    assert found["grid"][0]["score"] == score and "answer_nll" not in found["grid"][0]
    assert "nll_by_steps" not in found


@pytest.mark.parametrize("name", ["read_results", "Journal", "environment", "RESULTS", "JOURNAL"])
def test_results_of_the_last_version_are_where_they_were(name: str) -> None:
    assert hasattr(importlib.import_module("hfpatch.evals.results"), name)
