"""The points at which a method acts: bias, reweight, output, observe, alone and together."""

import pytest
import torch
import zoo
from test_invariants import assert_close, built, logits
from torch import Tensor
from toy_methods import (
    LENGTH,
    FirstKey,
    KeepAll,
    LseRecorder,
    NoFirstKey,
    Recorder,
    ScaleHeads,
    Toy,
    make,
    named,
    padded,
    softmax_of,
    some,
    toys,  # noqa: F401  (registers the toys around each test)
    values_of,
)

from hfpatch import patched
from hfpatch.config import registry
from hfpatch.core.call import AttentionCall
from hfpatch.core.reweight import Columns
from hfpatch.core.reweight import reweight as reweight_op
from hfpatch.ops import attend


@some
@pytest.mark.parametrize("base", [None, "streaming"])
@pytest.mark.parametrize("where", ["plain", "padded"])
def test_reweight_gives_the_weights_of_its_formula(name: str, base: str | None, where: str) -> None:
    tiny, model = zoo.SUPPORTED[name], built(name)
    gamma = 3.0
    head = [registry.make_config("streaming", {"sink": 2, "window": 8})] if base else []
    batch, kwargs = padded(tiny) if where == "padded" else (zoo.prompt(model, 2, LENGTH), {})
    with patched(model, [*head, make(FirstKey, factor=gamma), make(Recorder)]) as patch:
        logits(model, batch, **kwargs)
        seen = patch.methods[-1].seen
    assert seen
    for call, out, _ in seen:
        selection = head and patch.methods[0].select(call)
        a = softmax_of(call, selection or None)
        factor = torch.ones_like(a)
        factor[..., 0] = gamma
        weights = factor * a / ((gamma - 1) * a[..., :1] + 1)
        assert_close("first key", weights[..., 0], gamma * a[..., 0] / ((gamma - 1) * a[..., 0] + 1))
        assert_close("out", out, values_of(call, weights))


def test_reweight_by_zero_leaves_nothing_where_nothing_is_left() -> None:
    """The first query sees only the first key: taking it away gives 0 and lse -inf, not NaN."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    call = AttentionCall(0, 1, "prefill", q, k, v, 8**-0.5)
    done = attend(q, k, v, selection=None, scale=call.scale)
    out, lse = reweight_op(call, done.out, done.lse, [Columns(torch.tensor([0]), 0.0)], None)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0])) and bool(lse[..., 0].isneginf().all())
    a = softmax_of(call).clone()
    a[..., 0] = 0
    want = values_of(call, a / a.sum(-1, keepdim=True).clamp_min(1e-30))
    assert_close("other queries", out[:, 1:], want[:, 1:])


def test_reweights_may_share_columns() -> None:
    """One after the other: each group renormalises what the earlier ones left."""
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    call = AttentionCall(0, 1, "prefill", q, k[:, :1], v[:, :1], 8**-0.5)
    done = attend(call.q, call.k, call.v, selection=None, scale=call.scale)
    groups = [
        Columns(torch.tensor([0, 3]), 2.0), Columns(slice(2, 5), torch.tensor([0.5, 4.0])),
        Columns(torch.tensor([3]), lambda w: 1 + w),
    ]  # fmt: skip
    a = softmax_of(call)
    for group, factor in zip(groups, (2.0, torch.tensor([0.5, 4.0]).view(2, 1, 1), None), strict=True):
        columns = group.indices(q.device)
        a = a.clone()
        a[..., columns] *= 1 + a[..., columns] if factor is None else factor
        a = a / a.sum(-1, keepdim=True)
    out, lse = reweight_op(call, done.out, done.lse, groups, None)
    assert_close("out", out, values_of(call, a))
    assert bool(lse.isfinite().all())


@some
@pytest.mark.parametrize("where", ["plain", "padded"])
def test_bias_is_added_after_softcap(name: str, where: str) -> None:
    tiny, model = zoo.SUPPORTED[name], built(name)
    batch, kwargs = padded(tiny) if where == "padded" else (zoo.prompt(model, 2, LENGTH), {})
    with patched(model, [make(NoFirstKey, factor=-0.5), make(Recorder)]) as patch:
        logits(model, batch, **kwargs)
        seen = patch.methods[-1].seen
    for call, out, _ in seen:
        a = softmax_of(call)
        scale = torch.exp(-0.5 * torch.arange(1, call.Hq + 1.0))[None, :, None]
        a0 = a[..., 0] * scale
        norm = 1 + a0 - a[..., 0]
        weights = torch.cat([a0[..., None], a[..., 1:]], -1) / norm[..., None]
        assert_close("out", out, values_of(call, weights))


def test_biases_add_up() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, make(NoFirstKey, factor=0.75)):
        want = logits(model, ids)
    other = type("Again", (NoFirstKey,), {})
    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(registry._registered, "toy-Again", named(other))
        with patched(model, [make(NoFirstKey, factor=0.5), make(other, factor=0.25)]):
            assert_close("logits", logits(model, ids), want)


@some
@pytest.mark.parametrize("where", ["plain", "left", "right"])
def test_output_on_both_paths(name: str, where: str) -> None:
    """The same head gate after the model's own kernel and after ours, on every real token."""
    tiny, model = zoo.SUPPORTED[name], built(name)
    batch, kwargs = (zoo.prompt(model, 3, LENGTH), {}) if where == "plain" else padded(tiny, where)
    real = kwargs["attention_mask"].bool() if kwargs else torch.ones_like(batch).bool()
    plain = logits(model, batch, **kwargs)[real]
    with patched(model, make(ScaleHeads)) as patch:
        base = logits(model, batch, **kwargs)[real]
        assert all("torch" not in line.stats.executors for line in patch.report().lines)
    with patched(model, [make(KeepAll), make(ScaleHeads)]) as patch:
        ours = logits(model, batch, **kwargs)[real]
        assert all("torch" in line.stats.executors for line in patch.report().lines)
    assert_close("paths", ours, base)
    assert float((base - plain).abs().max() / plain.abs().max()) > 1e-3


@some
@pytest.mark.parametrize("where", ["plain", "left"])
def test_observers_see_the_result(name: str, where: str) -> None:
    tiny, model = zoo.SUPPORTED[name], built(name)
    batch, kwargs = (zoo.prompt(model, 3, LENGTH), {}) if where == "plain" else padded(tiny)
    want = logits(model, batch, **kwargs)
    with patched(model, [make(LseRecorder), make(Recorder)]) as patch:
        assert_close("logits", logits(model, batch, **kwargs)[:, -1], want[:, -1])
        seen = patch.methods[0].seen
        assert len(seen) == len(patch.methods[1].seen) == len(patch.layers) * (1 if where == "plain" else 3)
    for call, out, lse in seen:
        exact = attend(
            call.q, call.k, call.v, selection=None, scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            executor="reference",
        )  # fmt: skip
        assert lse is not None
        assert_close("lse", lse, exact.lse)
        assert_close("out", out, exact.out)


def test_an_observer_without_needs_leaves_the_models_own_kernel() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, LENGTH)
    want = logits(model, ids)
    with patched(model, make(Recorder)) as patch:
        assert torch.equal(logits(model, ids), want)
        assert all(lse is None for _, _, lse in patch.methods[0].seen) and patch.methods[0].seen


class NewLse(Toy):
    """Halves the output, and says so of the lse, too."""

    needs = frozenset({"lse"})

    def output(self, call: AttentionCall, out: Tensor) -> tuple[Tensor, Tensor]:
        assert call.lse is not None
        return out / 2, call.lse - 1


def test_output_may_change_the_lse_and_later_methods_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "toy-NewLse", named(NewLse))
    model = built("llama")
    ids = zoo.prompt(model, 2, LENGTH)
    seen = []
    for methods in ([make(LseRecorder)], [make(NewLse), make(LseRecorder)]):
        with patched(model, methods) as patch:
            logits(model, ids)
            seen.append(patch.methods[-1].seen[0])
    (_, out, lse), (_, half, less) = seen
    assert_close("out", half, out / 2)
    assert_close("lse", less, lse - 1)


def test_a_method_by_the_old_name_of_a_point_is_refused() -> None:
    with pytest.raises(TypeError, match="the point is `reweight` now"):

        class Old(Toy):
            def regroup(self, call: AttentionCall) -> list[Columns]:
                return []
