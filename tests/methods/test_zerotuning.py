"""ZeroTuning: the equation, its equivalent forms, where it acts, what it warns of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from test_invariants import built, logits
from test_reweight import LK, make_call
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import hfpatch
from hfpatch import PatchConfig, patched
from hfpatch.core.reweight import Columns, reweight
from hfpatch.methods.streaming import StreamingConfig
from hfpatch.methods.zerotuning import ZeroTuningConfig, third_of
from hfpatch.ops import attend
from hfpatch.runtime.chain import Chain
from hfpatch.runtime.pipeline import LayerRuntime

GAMMA = 3.0
ACTS = [t for t in zoo.SUPPORTED.values() if not t.all_sliding]
architectures = pytest.mark.parametrize("tiny", ACTS, ids=lambda t: t.name)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, starts: list[int]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (attention on each row's initial token without zerotuning, with it), `[B, Lq, Hq]` per call.

    The last value channel of every call is 1 at the initial token `starts[row]` and 0 elsewhere, so the last
    channel of the attention output is the attention on that token, whatever computed it.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    run = LayerRuntime.run

    def spying(self: LayerRuntime, raw: Any) -> Any:
        raw.v = raw.v.clone()
        raw.v[..., -1] = 0
        for row, start in enumerate(starts):
            raw.v[row, :, start, -1] = 1
        chains = self._chains
        self._chains = {p: Chain([m for m in c.methods if m.name != "zerotuning"]) for p, c in chains.items()}
        before = run(self, raw)[0][..., -1]
        self._chains = chains
        out, weights = run(self, raw)
        seen.append((before, out[..., -1]))
        return out, weights

    with monkeypatch.context() as patch:
        patch.setattr(LayerRuntime, "run", spying)
        yield seen


def check(seen: list[tuple[Tensor, Tensor]], real: Tensor, gamma: float | Tensor = GAMMA) -> None:
    """`real [B, Lq]` are the queries that are no padding."""
    assert seen
    for before, after in seen:
        want = gamma * before / ((gamma - 1) * before + 1)
        torch.testing.assert_close(after[real], want[real], rtol=0, atol=1e-5)
        assert (after - before)[real].abs().max() > 1e-3


@architectures
def test_attention_on_the_initial_token(tiny: zoo.TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, 63)
    with patched(model, "zerotuning", gamma=GAMMA), watched(monkeypatch, [0, 0]) as seen, torch.no_grad():
        cache = model(ids[:, :60], use_cache=True).past_key_values
        check(seen, torch.ones(2, 60, dtype=torch.bool))
        assert len(seen) == len(tiny.full_layers)
        seen.clear()
        model(ids[:, 60:61], past_key_values=cache)
        check(seen, torch.ones(2, 1, dtype=torch.bool))


@architectures
@pytest.mark.parametrize("side", ["left", "right"])
def test_initial_token_of_padded_rows(tiny: zoo.TinyModel, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(tiny.name)
    lengths = [63, 40, 25]
    ids, mask = (zoo.left_pad if side == "left" else zoo.right_pad)(zoo.prompt(model, 3, 63), lengths)
    extra = {"position_ids": zoo.positions(mask)} if tiny.learned_positions else {}
    starts = [63 - n for n in lengths] if side == "left" else [0, 0, 0]
    with patched(model, "zerotuning", gamma=GAMMA), watched(monkeypatch, starts) as seen:
        logits(model, ids, attention_mask=mask, **extra)
    check(seen, mask.bool())


SPARSE: dict[str, dict[str, Any]] = {
    "streaming": {"sink": 2, "window": 8},
    "flash_prefill": {"min_length": 0, "block_q": 16, "block_k": 16, "budget": 64, "last_blocks": 0},
    "dhsa": {"budget": 64, "sink": 8, "local": 8, "block_q": 16, "question_tokens": 8},
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_on_top_of_a_sparse_method(arch: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(arch)
    base = hfpatch.get_method(name).config_class.from_dict(SPARSE[name])
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, 257), [257, 201])
    for order in (1, -1):
        both = [base, ZeroTuningConfig(gamma=GAMMA)][::order]
        with patched(model, both) as patch, watched(monkeypatch, [0, 56]) as seen:
            logits(model, ids, attention_mask=mask)
            assert not patch.report().fallbacks() and patch.report().density() < 0.9
        check(seen, mask.bool())


def test_decode_on_top_of_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("gpt_oss")
    ids = zoo.prompt(model, 2, 63)
    both = [StreamingConfig(sink=1, window=6), ZeroTuningConfig(gamma=0.2)]
    with patched(model, both), watched(monkeypatch, [0, 0]) as seen, torch.no_grad():
        cache = model(ids[:, :60], use_cache=True).past_key_values
        seen.clear()
        model(ids[:, 60:61], past_key_values=cache)
    check(seen, torch.ones(2, 1, dtype=torch.bool), 0.2)


@architectures
def test_gamma_one_is_the_identity(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, 63)
    want = logits(model, ids)
    with patched(model, "zerotuning", gamma=1.0) as patch:
        assert torch.equal(logits(model, ids), want)
        assert any("changes nothing" in note for note in patch.report().notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_four_forms_agree(dtype: torch.dtype) -> None:
    """Bias on the logits, a mask column, an extra channel under a causal kernel, and correction afterwards."""
    call = make_call(dtype=dtype)
    gamma = torch.tensor([0.25, 1.0, 2.0, 6.0], dtype=dtype)
    k, v = (t.repeat_interleave(call.groups, 1) for t in (call.k, call.v))
    causal = torch.ones(LK, LK, dtype=torch.bool).tril()

    column = torch.zeros(1, 4, LK, LK, dtype=dtype).masked_fill(~causal, -torch.inf)
    column[..., 0] += gamma.log()[:, None]
    mask = sdpa(call.q, k, v, attn_mask=column, scale=call.scale).transpose(1, 2)

    extra_q = (gamma.log() / call.scale)[None, :, None, None].expand(2, 4, LK, 1)
    extra_k = torch.zeros(2, 4, LK, 1, dtype=dtype)
    extra_k[:, :, 0] = 1
    wide = sdpa(torch.cat([call.q, extra_q], -1), torch.cat([k, extra_k], -1), v, is_causal=True, scale=call.scale)

    logits_ = (call.scale * call.q @ k.mT).masked_fill(~causal, -torch.inf)
    dense = (logits_.softmax(-1) @ v).transpose(1, 2)
    later = reweight(call, dense, logits_.logsumexp(-1), [Columns(slice(0, 1), gamma)], None)[0]

    bias = torch.zeros(1, 4, LK, dtype=dtype)
    bias[..., 0] = gamma.log()
    if dtype == torch.float32:
        first = attend(call.q, call.k, call.v, selection=None, scale=call.scale, bias=bias).out
    else:
        first = ((logits_ + bias[:, :, None]).softmax(-1) @ v).transpose(1, 2)
    for name, form in {"mask": mask, "channel": wide.transpose(1, 2), "bias": first}.items():
        error = (form - later).abs().max() / later.abs().max()
        assert error <= 1e-6, f"{name}: {error:.1e}"


def test_factors_by_head_layer_and_tensor() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, 63)

    def run(config: Any, tensors: dict[str, Tensor] | None = None) -> Tensor:
        with patched(model, PatchConfig([config], tensors=tensors or {})):
            return logits(model, ids)

    picked = run(ZeroTuningConfig(gamma=2.0, heads=[1, 6]))
    rows = torch.ones(8)
    rows[[1, 6]] = 2.0
    assert torch.equal(run(ZeroTuningConfig(gammas=rows.tolist())), picked)
    assert torch.equal(run(ZeroTuningConfig(), {"0.gamma": rows}), picked)
    assert not torch.equal(run(ZeroTuningConfig(gamma=2.0)), picked)
    first = torch.ones(3, 8)
    first[0] = rows
    assert torch.equal(
        run(ZeroTuningConfig(), {"0.gamma": first}), run(ZeroTuningConfig(gamma=2.0, heads=[1, 6], layers=0))
    )


def test_thirds_are_those_of_the_paper() -> None:
    thirds = [third_of(n, 32) for n in range(32)]
    assert [thirds.index(t) for t in ("shallow", "middle", "deep")] == [0, 11, 22] and thirds.count("deep") == 10
    model = built("llama")
    with patched(model, "zerotuning", gamma=2.0, depth="shallow, deep") as patch:
        assert patch.layers == [0, 2]
        assert "left dense by zerotuning" in str(patch.report())


def test_sliding_layers_are_left_alone() -> None:
    with patched(built("gemma3_text"), "zerotuning", gamma=2.0) as patch:
        assert patch.layers == [1, 3]
        assert "sliding attention" in str(patch.report())


@torch.no_grad()
def test_model_without_a_sink_is_named() -> None:
    model = zoo.SUPPORTED["llama-mha"].build()
    ids = zoo.prompt(model, 1, 63)
    with patched(model, "zerotuning", gamma=2.0) as patch:
        logits(model, ids)
        assert patch.methods[0].sink_mass < 0.1
        assert any("no attention sink" in note for note in patch.report().notes)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    with patched(model, "zerotuning", gamma=2.0) as patch:
        logits(model, ids[:, :20])
        want = float((1 / torch.arange(11, 21)).mean())
        assert abs(patch.methods[0].sink_mass - want) < 1e-6
    with patched(model, "zerotuning", gamma=2.0) as patch:
        logits(model, ids[:, :16])
        assert patch.methods[0].sink_mass < 0.1
    seen = patch.methods[0]
    seen._masses = {0: torch.tensor(0.4)}
    assert not any("no attention sink" in note for note in seen.notes())


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"depth": "upper"}, "shallow, middle, deep"),
        ({"depth": "deep", "layers": 1}, "depth and layers"),
        ({"gammas": [1.0, 2.0], "gamma": 2.0}, "gammas already"),
        ({"gammas": [0.0]}, "must all be"),
        ({"heads": [-1]}, "from 0 on"),
        ({"heads": [8], "gamma": 2.0}, "no head 8; the model has 8 query heads"),
        ({"gammas": [1.0, 2.0]}, "2 heads; the model has 8"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(hfpatch.ConfigError, match=match):
        hfpatch.patch_model(built("llama"), "zerotuning", **settings)
