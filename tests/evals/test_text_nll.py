"""NLL of text in the first table: mean over all tokens of the longest prompts, with its paired difference to dense."""

import math
from typing import Any

import pytest
import torch
from hfpatch.evals.jobs.perplexity import PerplexityJob
from hfpatch.evals.report.summary import answer_table, lines
from hfpatch.evals.run.cells import Cell, Session
from hfpatch.evals.run.models import load_model
from hfpatch.evals.run.stats import mean_interval
from hfpatch.evals.run.variants import parse_variants
from hfpatch.evals.tasks import PerplexityByPosition
from hfpatch.evals.tasks.perplexity import token_nll

from hfpatch.text.prompt_ids import prompt_ids

STREAMING = "streaming:sink=2,window=16"


def entry(job: PerplexityJob, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"label": "perplexity", "kind": "perplexity", "settings": job.settings(), "rows": rows}


def test_the_first_table_has_the_nll_of_all_tokens_of_the_longest_prompts_and_its_difference() -> None:
    job, session = PerplexityJob([64, 150], 3, 4), Session("embedded", parse_variants([STREAMING, "quest"]), seed=2)
    session.loaded = load_model("embedded")
    rows = job.rows({cell: job.run(cell, session).data for cell in job.cells(session.variants)})
    view = PerplexityJob.view(entry(job, rows))
    samples = PerplexityByPosition().samples(session.loaded.tokenizer, 150, 3, 2, haystack="prose")
    ids = [torch.tensor([prompt_ids(session.loaded.tokenizer, s.prompt)]) for s in samples]
    told: dict[str, list[torch.Tensor]] = {}
    for variant in session.variants:
        with variant.applied(session.loaded.model):
            told[variant.name] = [token_nll(session.loaded.model, row) for row in ids]
    table = answer_table(lines(list(told), view.answers))
    assert table.header == ["variant", "NLL"]
    cells = {row[0].text: row[1] for row in table.cells}
    for name, rows_ in told.items():
        assert cells[name].text == f"{float(torch.cat(rows_).mean()):.3f}"
    assert cells["dense"].small == "" and cells["quest"].small == "+0.000 ± 0.000"
    apart = [float(a.mean() - b.mean()) for a, b in zip(told[STREAMING], told["dense"], strict=True)]
    middle, _, high = mean_interval(apart)
    assert cells[STREAMING].small == f"{middle:+.3f} ± {high - middle:.3f}" and middle > 0.01
    assert [r[-1].text for r in view.table.cells] == [c.text for c in cells.values()]
    assert len(view.table.header) == 6
    told_of = PerplexityJob.view(entry(job, rows), {"quest"})
    assert {a.variant for a in told_of.answers} == {"dense", STREAMING}
    assert told_of.notes[1:] == ["quest acts in decode steps alone, and this text was read at once."]


def data(nll: float, samples: list[float] | None) -> dict[str, Any]:
    positions = [
        {"start": 1, "stop": 4, "tokens": 3, "nll": nll, "perplexity": math.exp(nll)},
        {"start": 4, "stop": 5, "tokens": 1, "nll": nll + 4, "perplexity": math.exp(nll + 4)},
    ]
    found = {"positions": positions, "samples": 1, "question_in_sparse_part": True, "density_prefill": 1.0}
    return {**found, "density_decode": 1.0, **({} if samples is None else {"nll_of_samples": samples})}


@pytest.mark.parametrize("samples, small", [([2.5], "+0.250"), ([2.0, 3.0], "+0.250 ± 6.353"), (None, "")])
def test_positions_weigh_by_their_tokens_and_one_sample_or_an_older_run_has_no_interval(samples, small) -> None:
    job = PerplexityJob([16])
    dense = None if samples is None else [2.25] * len(samples)
    rows = job.rows({Cell("p", "dense", 16): data(1.0, dense), Cell("p", "own", 16): data(1.5, samples)})
    own = next(a for a in PerplexityJob.view(entry(job, rows)).answers if a.variant == "own")
    assert own.value == pytest.approx(2.5) and own.small == small and own.clear == ("±" not in small)


def test_intervals_of_means_are_students() -> None:
    assert mean_interval([3.0]) == (3.0, None, None)
    middle, low, high = mean_interval([1.0, 2.0, 4.0])
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)
    assert (middle, low, high) == (pytest.approx(7 / 3), pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))
