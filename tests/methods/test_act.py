"""ACT against its equation, over prefill, chunks and decoding, and its influence of later tokens on earlier ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_invariants import built, logits
from test_reweight import EXTRAS, LK, make_call, run, values, weights_of
from torch import Tensor

import hfpatch
from hfpatch import patched
from hfpatch.methods._column_sums import ColumnSums
from hfpatch.methods.act import ACT, ACTConfig

THRESHOLD = 0.03


def by_the_equation(weights: Tensor, share: float, beta: float, heads: list[int], rest: Tensor) -> Tensor:
    """Calibrated weights `[B, Hq, Lq, Lk]` of a prefill, one row, head and key at a time; `rest` is no key's."""
    new = weights.clone()
    lk = weights.shape[-1]
    for b in range(weights.shape[0]):
        for h in heads:
            sinks = [k for k in range(1, lk) if weights[b, h, k:, k].mean() > share]
            assert sinks, "the test needs sinks"
            for i in range(lk):
                mass = weights[b, h, i, sinks].sum()
                new[b, h, i] *= 1 + (1 - beta) * mass / (1 - mass)
                new[b, h, i, sinks] = beta * weights[b, h, i, sinks]
    total = new.sum(-1)
    left = 1 - total
    assert (left >= -1e-9).all() and ((left > 1e-9) == (rest > 1e-9)).all()
    return new


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("chunk", [1 << 22, 1])
def test_equals_the_equation(extra: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfpatch.methods._column_sums.CHUNK_ELEMENTS", chunk)
    call = make_call(**extra)
    method = ACT(ACTConfig(beta=0.4, threshold=THRESHOLD, heads=[[0, 1], [0, 2]]))
    out, _ = run(call, method.reweight(call))
    weights = weights_of(call)
    want = values(call, by_the_equation(weights, THRESHOLD, 0.4, [1, 2], 1 - weights.sum(-1)))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert (want - values(call, weights))[:, :, [1, 2]].abs().max() > 0.01


def test_the_papers_threshold_goes_by_length() -> None:
    assert ACTConfig().share(50) == 0.1 and ACTConfig(threshold="2/N").share(8) == 0.25
    assert ACTConfig(threshold=0.2).share(8) == 0.2


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_running_means_over_chunks_and_decoding(extra: dict[str, Any]) -> None:
    whole = make_call(**extra)
    want = weights_of(whole)[:, [0, 3]]
    sums: ColumnSums | None = None
    for start, stop in ((0, 40), (40, 60), (60, 61), (61, 62)):
        part = make_call(**extra)
        part.q, part.k = whole.q[:, :, start:stop], whole.k[:, :, :stop]
        part.bias = None if whole.bias is None else whole.bias[..., :stop]
        sums = ColumnSums.of(part, sums, [0, 3])
        mean = torch.stack([want[:, :, k:stop, k].mean(-1) for k in range(stop)], -1)
        torch.testing.assert_close(sums.means().double(), mean, rtol=1e-5, atol=1e-6)
    assert sums is not None
    other = sums.reorder(torch.tensor([1, 1]))
    assert torch.equal(other.sums[0], sums.sums[1])
    other.crop(41)
    assert other.means().shape == (2, 2, 41) and sums.sums.shape[-1] == 62


def test_decoding_remembers_the_prompt() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, LK)
    with patched(model, "act", beta=0.2, threshold=THRESHOLD) as patch, torch.no_grad():
        cache = model(ids[:, :60], use_cache=True).past_key_values
        model(ids[:, 60:61], past_key_values=cache)
        (states,) = cache.layers[0].hfpatch_states.values()
        state = states[(0, 1)]["act"]
        assert state.sums.shape == (2, 8, 61) and state.counts[[0, 59, 60]].tolist() == [61.0, 2.0, 1.0]
        assert not patch.report().fallbacks()


def test_beta_one_and_an_empty_list_are_the_identity() -> None:
    model = built("gpt_oss")
    ids = zoo.prompt(model, 1, LK)
    want = logits(model, ids)
    for settings in ({"beta": 1.0}, {"heads": []}):
        with patched(model, "act", threshold=THRESHOLD, **settings) as patch:
            assert torch.equal(logits(model, ids), want)
    assert any("list is empty" in note for note in patch.report().notes)


def test_later_tokens_move_earlier_logits_and_it_says_so() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, LK)
    other = ids.clone()
    other[:, 40:] = zoo.prompt(model, 1, LK, seed=1)[:, 40:]
    with patched(model, "act", threshold=THRESHOLD) as patch:
        moved = (logits(model, other) - logits(model, ids))[:, :40].abs().max()
        assert moved > 1e-2 and patch.methods[0].causality == "no"
        assert any("log-likelihoods" in note for note in patch.report().notes)


def test_heads_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    for content in ([[0, 1], [2, 3]], {"heads": [[0, 1], [2, 3]]}):
        file.write_text(json.dumps(content))
        config = ACTConfig(heads=str(file))
        assert config.heads == [[0, 1], [2, 3]]
    with patched(built("llama"), config) as patch:
        assert patch.layers == [0, 2]
    file.write_text("[1, 2]")
    with pytest.raises(hfpatch.ConfigError, match="list of"):
        ACTConfig(heads=str(file))


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"threshold": "N/5"}, "'5/N'"),
        ({"threshold": 0.0}, "above 0"),
        ({"heads": [[1]]}, "pairs"),
        ({"heads": "nowhere.json"}, "readable JSON"),
        ({"heads": [[0, 8]]}, "no head 8"),
        ({"heads": [[0, 0], [9, 0]]}, "layer 9"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(hfpatch.HfpatchError, match=match):
        hfpatch.patch_model(built("llama"), "act", **settings)
