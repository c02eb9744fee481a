"""What audits of patched models find: they change nothing, follow padding and decoding, and say what they miss."""

from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_audit import call_of, run
from test_invariants import acts_on, built, logits, tree

from hfpatch import ConfigError, get_patch, patch_model, patched
from hfpatch.core.selection import Causal

MODELS = ["llama", "gemma2", "gpt_oss"]
PAIRS = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in MODELS
    for case in METHODS
    if acts_on(zoo.SUPPORTED[name], case)
]


@pytest.mark.parametrize("name,case", PAIRS)
def test_an_audit_changes_nothing_and_fits_the_report(name: str, case: MethodCase) -> None:
    model = built(name)
    ids, mask = zoo.left_pad(zoo.prompt(model, 3, 63), [63, 40, 25])
    with patched(model, case.name, **case.settings) as patch:
        before = tree(model)
        want = logits(model, ids, attention_mask=mask)
        with patch.audit(rows=8) as audit:
            assert torch.equal(logits(model, ids, attention_mask=mask), want)
        assert tree(model) == before
        once = audit.report().to_dict()
        logits(model, ids, attention_mask=mask)
        assert audit.report().to_dict() == once
        lines = audit.report().lines
        sparse = {line.layer for line in patch.report().lines if line.stats.density < 1}
        assert {x.layer for x in lines} >= sparse
        for line in lines:
            assert 0 < line.mass.mean <= 1 + 1e-5 and line.mass.low <= line.mass.mean <= line.mass.high
            assert line.kept is not None and line.best is not None
            assert line.kept.mean <= line.best.mean + 1e-5
            heads = model.config.get_text_config().num_attention_heads
            assert len(line.heads) == heads and sum(line.heads) / heads == pytest.approx(line.mass.mean, abs=1e-5)
        assert str(audit.report())


def test_padded_rows_are_audited_as_rows_alone() -> None:
    model = built("llama")
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, 63), [63, 40])
    with patched(model, "streaming", sink=2, window=8, layers=0) as patch:
        with patch.audit(rows=99) as together:
            logits(model, ids, attention_mask=mask)
        with patch.audit(rows=99) as alone:
            logits(model, ids[:1])
            logits(model, ids[1:, 23:])
    (a,), (b,) = together.report().lines, alone.report().lines
    assert a.mass.count == b.mass.count == 63 + 40
    for name in ("mass", "error", "best"):
        both = [list(getattr(x, name).to_dict().values()) for x in (a, b)]
        torch.testing.assert_close(torch.tensor(both[0]), torch.tensor(both[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(a.heads), torch.tensor(b.heads), rtol=1e-4, atol=1e-5)
    assert together.report().distances.keys() == alone.report().distances.keys() == {"under 64"}


@pytest.mark.parametrize("rows", [1, 3])
def test_generated_tokens_are_audited_step_by_step(rows: int) -> None:
    model = built("llama")
    ids = zoo.prompt(model, rows, 63)
    with patched(model, "streaming", sink=2, window=8, layers="1-") as patch, patch.audit(rows=5) as audit:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, eos_token_id=None)
    lines = {(x.layer, x.phase): x for x in audit.report().lines}
    assert lines.keys() == {(n, phase) for n in patch.layers for phase in ("prefill", "decode")}
    for (_, phase), line in lines.items():
        steps = 6 if phase == "decode" else 1
        assert line.calls == steps and line.mass.count == (steps if phase == "decode" else 5)
    near = audit.report().distances["under 64"]
    assert near.count == 5 * len(patch.layers)  # a decoded token is always the last


@pytest.mark.parametrize("name,settings", [("zerotuning", {"gamma": 2.0}), ("dense", {})])
def test_dense_calls_miss_nothing(name: str, settings: dict[str, Any]) -> None:
    model = built("llama")
    with patched(model, name, **settings) as patch, patch.audit() as audit:
        logits(model, zoo.prompt(model, 1, 40))
    run(call_of(), Causal(), audit)
    assert not audit.tallies and str(audit.report()) == "no sparse call has been audited"


@pytest.mark.parametrize("value", [-1, 1.5, True, "16", None])
@pytest.mark.parametrize("name", ["rows", "tiles"])
def test_rows_and_tiles_that_are_no_numbers(name: str, value: Any) -> None:
    patch = get_patch(patch_model(zoo.SUPPORTED["llama"].build(), "streaming"))
    with pytest.raises(ConfigError, match=rf"{name}=.*or more"), patch.audit(**{name: value}):
        pass
    with pytest.raises(ConfigError, match=r"rows=0.*1 or more"), patch.audit(rows=0):
        pass


def test_steps_in_a_graph_are_missed_and_said_so() -> None:
    model = built("llama")
    with patched(model, "streaming", window=8) as patch:
        patch._plan[0][1].in_graph = True
        with patch.audit() as audit:
            logits(model, zoo.prompt(model, 1, 40))
    assert any("torch.compile" in note for note in audit.report().to_dict()["notes"])
