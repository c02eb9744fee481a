"""The audit job: its figures are those of `Patch.audit`, dense layers keep everything, and the views say so."""

from typing import Any

import pytest
import torch
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs.audit import AuditJob, masses
from hfpatch.evals.report.plots import draw
from hfpatch.evals.report.summary import answer_table, lines
from hfpatch.evals.run.cells import Session
from hfpatch.evals.run.generation import generate_tokens
from hfpatch.evals.run.models import load_model
from hfpatch.evals.run.variants import Variant, parse_variants
from hfpatch.evals.tasks import PerplexityByPosition

from hfpatch import PatchConfig, patched
from hfpatch.config.registry import make_config
from hfpatch.core.audit_report import Sample, Tally
from hfpatch.text.prompt_ids import prompt_ids

BLOCKS = "block_topk:budget=64,block_q=16,block_k=16,min_length=0,window_blocks=1"
QUEST = "quest:budget=32,min_length=0"
SPECS = [BLOCKS, QUEST, "streaming:sink=2,window=32", "skip_softmax:min_length=4096"]


def ran(job: AuditJob, specs: list[str]) -> tuple[list[dict[str, Any]], Session]:
    session = Session("embedded", parse_variants(specs), seed=3)
    session.loaded = load_model("embedded")
    done = {cell: job.run(cell, session).data for cell in job.cells(session.variants)}
    return job.rows(done), session


def entry(job: AuditJob, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"label": "audit", "kind": "audit", "settings": job.settings(), "rows": rows}


@pytest.fixture(scope="module")
def found() -> tuple[AuditJob, list[dict[str, Any]], Session]:
    job = AuditJob([200], 2, rows_per_call=5, tiles=2, new_tokens=3)
    return job, *ran(job, SPECS)


def of(rows: list[dict[str, Any]], variant: str, phase: str) -> dict[str, Any]:
    (row,) = (r for r in rows if (r["variant"], r["phase"]) == (variant, phase))
    return row


def test_figures_are_those_of_the_patch_s_own_audit(found) -> None:
    _, rows, session = found
    loaded, own = session.loaded, session.variants[1]
    samples = PerplexityByPosition().samples(loaded.tokenizer, 200, 2, 3, haystack="prose")
    with patched(loaded.model, own.config) as patch, patch.audit(5, tiles=2, seed=3) as looked:
        for s in samples:
            generate_tokens(loaded, torch.tensor([prompt_ids(loaded.tokenizer, s.prompt)]), 4)
    row = of(rows, own.name, "prefill")
    want = {x.layer: x for x in looked.report().lines}
    assert row["sparse_layers"] == len(want) == 4 and {x.phase for x in want.values()} == {"prefill"}
    for layer in row["layers"]:
        line = want[layer["layer"]].to_dict()
        for name in ("mass", "error", "kept_in_tiles", "oracle_in_tiles"):
            assert layer[name]["mean"] == pytest.approx(line[name]["mean"]), name
        assert layer["mass"]["low"] == pytest.approx(line["mass"]["low"])
        gap = line["oracle_in_tiles"]["mean"] - line["kept_in_tiles"]["mean"]
        assert gap > 0 and layer["oracle"] == pytest.approx(min(1.0, line["mass"]["mean"] + gap))
    assert row["mass"]["mean"] == pytest.approx(looked.report().mass())
    assert row["mass"]["low"] < row["mass"]["mean"] < row["oracle"] < 1 and row["error"]["mean"] > 0
    assert row["density"] == pytest.approx(patch.report().density("prefill"))


def test_what_is_dense_keeps_everything_and_what_goes_by_position_is_its_own_oracle(found) -> None:
    _, rows, _ = found
    whole = [("dense", "prefill"), ("dense", "decode"), (QUEST, "prefill"), (BLOCKS, "decode"), (SPECS[3], "prefill")]
    for variant, phase in whole:
        row = of(rows, variant, phase)
        assert (row["mass"]["mean"], row["oracle"], row["error"]["mean"], row["sparse_layers"]) == (1.0, 1.0, 0.0, 0)
        assert row["density"] == 1.0 and [x["layer"] for x in row["layers"]] == [0, 1, 2, 3]
    for phase in ("prefill", "decode"):
        row = of(rows, SPECS[2], phase)
        assert row["mass"]["mean"] < 0.95 and row["oracle"] == pytest.approx(row["mass"]["mean"])
    assert of(rows, QUEST, "decode")["mass"]["mean"] < 0.95


def test_the_view_shows_what_acts_and_says_what_does_not(found, tmp_path) -> None:
    job, rows, _ = found
    view = AuditJob.view(entry(job, rows), {QUEST})
    shown = [(r[0].text, r[2].text) for r in view.table.cells]
    assert shown == [
        ("dense", "prefill"), (BLOCKS, "prefill"), (QUEST, "decode"), (SPECS[2], "prefill"), (SPECS[2], "decode"),
        (SPECS[3], "prefill"),
    ]  # fmt: skip
    least = min(of(rows, BLOCKS, "prefill")["layers"], key=lambda x: x["mass"]["mean"])
    assert view.table.cells[1][6].text == f"{least['layer']}: {least['mass']['mean']:.3f}"
    assert any(n.startswith(f"{QUEST}: nothing to miss in the prefill") for n in view.notes)
    assert any(n.startswith(f"{SPECS[3]}: no call was sparse here") for n in view.notes)
    answers = {(a.variant, a.aspect.name): a.value for a in view.answers}
    assert answers[QUEST, "mass kept"] == of(rows, QUEST, "decode")["mass"]["mean"]
    assert answers[BLOCKS, "oracle"] == of(rows, BLOCKS, "prefill")["oracle"]
    table = answer_table(lines(["dense", BLOCKS], view.answers))
    assert table.header == ["variant", "mass kept", "oracle"] and table.rows[0] == ["dense", "1.000", "1.000"]
    assert [(p.title, len(p.series)) for p in view.plot.panels] == [("prefill", 6), ("decode", 4)]
    assert draw(view.plot, tmp_path / "audit.png", "x").read_bytes().startswith(b"\x89PNG")


def test_without_tiles_and_steps_there_is_no_oracle_and_no_answer_of_decode_methods() -> None:
    job = AuditJob([128], 1, rows_per_call=4, tiles=0, new_tokens=0)
    rows, _ = ran(job, [BLOCKS, QUEST])
    assert {r["phase"] for r in rows} == {"prefill"}
    assert of(rows, BLOCKS, "prefill")["oracle"] is None and of(rows, BLOCKS, "prefill")["kept_in_tiles"] is None
    view = AuditJob.view(entry(job, rows), {QUEST})
    assert {a.variant for a in view.answers} == {"dense", BLOCKS}
    assert view.table.cells[1][4].text == "-" and not any(s.dashed for s in view.plot.panels[0].series[1:])


def test_calls_that_were_dense_count_as_keeping_everything() -> None:
    tally = Tally()
    half = torch.full((1, 2, 4), 0.5)
    tally.add(Sample(half, half / 2, torch.arange(4), 4, torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.7])))
    for calls, share in ((1, 1.0), (4, 0.25)):
        told = masses([tally], calls)
        assert told["mass"]["mean"] == pytest.approx(1 - 0.5 * share)
        assert told["error"]["mean"] == pytest.approx(0.25 * share)
        assert told["oracle"] == pytest.approx(1 - 0.3 * share)


def test_a_length_beyond_the_window_is_refused_before_anything_is_run() -> None:
    session = Session("embedded", [Variant("dense")])
    session.loaded = load_model("embedded")
    job = AuditJob([10**7])
    with pytest.raises(EvaluationError, match="too many"):
        job.check(job.cells(session.variants)[0], session)


def test_steps_that_could_not_be_looked_at_are_left_out() -> None:
    """A cache that drops keys hides what decode steps miss: no row, rather than one that says nothing is missed."""
    settings = {"sparse_layers": "1-", "sparse_settings": {"sink": 4, "window": 32}}
    job = AuditJob([200], 1, rows_per_call=2, tiles=0, new_tokens=3)
    session = Session("embedded", [Variant("kept", PatchConfig([make_config("flux", settings)]))], seed=3)
    session.variants += [Variant("cropped", PatchConfig([make_config("flux", {**settings, "crop_cache": True})]))]
    session.loaded = load_model("embedded")
    rows = job.rows({cell: job.run(cell, session).data for cell in job.cells(session.variants)})
    assert [(r["variant"], r["phase"]) for r in rows] == [
        ("kept", "prefill"), ("kept", "decode"), ("cropped", "prefill"),
    ]  # fmt: skip
    assert "dropped keys" in " ".join(rows[-1]["notes"])
