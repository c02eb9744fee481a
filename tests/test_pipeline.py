"""The points at which a method acts: select, bias, reweight, output, route, observe, alone and together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import zoo
from test_invariants import assert_close, built, logits
from torch import Tensor

import hfpatch
from hfpatch import IncompatibleMethodsError, Method, MethodConfig, patched
from hfpatch.config import registry
from hfpatch.core.call import AttentionCall
from hfpatch.core.reweight import Columns
from hfpatch.core.reweight import reweight as reweight_op
from hfpatch.core.selection import BlockMap, Causal, Selection
from hfpatch.methods.flux.method import FluxConfig
from hfpatch.methods.streaming import StreamingConfig
from hfpatch.methods.zerotuning import ZeroTuningConfig
from hfpatch.ops import attend

LENGTH = 41
LENGTHS = [LENGTH, 26, 12]
KINDS = frozenset({"full"})


@dataclass(kw_only=True)
class ToyConfig(MethodConfig):
    """One number a toy may use."""

    factor: float = 2.0


class Toy(Method):
    """Base of the toys; each has its own config class, made by `toy`."""

    config: ToyConfig

    @property
    def factor(self) -> float:
        return self.config.factor


class KeepAll(Toy):
    def select(self, call: AttentionCall) -> Selection:
        return Causal()


class RandomBlocks(Toy):
    """Random key blocks per head and query block, its own block always included."""

    block_q, block_k = 8, 8

    def select(self, call: AttentionCall) -> Selection:
        n_q, n_k = -(-call.Lq // self.block_q), -(-call.Lk // self.block_k)
        seed = torch.Generator().manual_seed(call.Lk * 131 + call.layer)
        score = torch.rand(1, call.Hkv, n_q, n_k, generator=seed)
        last = (torch.arange(1, n_q + 1) * self.block_q).clamp(max=call.Lq) + call.off - 1
        first = torch.arange(n_q) * self.block_q + call.off
        blocks = torch.arange(n_k)
        near = (blocks >= (first // self.block_k)[:, None]) & (blocks <= (last // self.block_k)[:, None])
        score = score.masked_fill(near, 2.0).masked_fill(blocks > (last // self.block_k)[:, None], -1.0)
        counts = (near.sum(-1) + 1).clamp(max=n_k).expand(1, call.Hkv, -1)
        counts = torch.minimum(counts, (score >= 0).sum(-1))
        return BlockMap(score.argsort(-1, descending=True), counts, self.block_q, self.block_k)


class RandomTokens(RandomBlocks):
    block_q, block_k = 1, 1


class NoFirstKey(Toy):
    """A bias on the first key, different for each head."""

    def bias(self, call: AttentionCall) -> Tensor:
        out = torch.zeros(1, call.Hq, call.Lk)
        out[..., 0] = self.factor * torch.arange(1, call.Hq + 1)
        return out


class FirstKey(Toy):
    """Multiplies the weight of the first key by `factor`."""

    def reweight(self, call: AttentionCall) -> list[Columns]:
        return [Columns(torch.tensor([0]), self.factor)]


class ScaleHeads(Toy):
    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        return out * torch.linspace(0.5, self.factor, call.Hq)[:, None]


class Recorder(Toy):
    """Keeps what it saw."""

    def __init__(self, config: ToyConfig, tensors: Any = None) -> None:
        super().__init__(config, tensors)
        self.seen: list[tuple[AttentionCall, Tensor, Tensor | None]] = []

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        self.seen.append((call, out, lse))


class LseRecorder(Recorder):
    needs = frozenset({"lse"})


class Router(Toy):
    """By the parity of the row's first query norm: streaming or dense; the decision of prefill is kept."""

    stateful = True
    choose: ClassVar[Callable[[int], str | None]]

    def __init__(self, config: ToyConfig, tensors: Any = None) -> None:
        super().__init__(config, tensors)
        streaming = registry.get_method("streaming")
        make = registry.make_config
        self.children = {
            "narrow": streaming(make("streaming", {"sink": 1, "window": 4})),
            "wide": streaming(make("streaming", {"sink": 2, "window": 12})),
        }
        self.decided = 0

    def route(self, call: AttentionCall) -> list[Method | None]:
        if "choice" not in call.state:
            self.decided += 1
            values = call.hidden[:, 0].double().abs().sum(-1)
            order = (values * 1000).long() % 3
            call.state["choice"] = [(None, "narrow", "wide")[n] for n in order.tolist()]
        return [self.children.get(c) for c in call.state["choice"]]


class DenseRouter(Toy):
    def route(self, call: AttentionCall) -> list[Method | None]:
        return [None] * call.B


TOYS = [
    KeepAll, RandomBlocks, RandomTokens, NoFirstKey, FirstKey, ScaleHeads, Recorder, LseRecorder, Router, DenseRouter
]  # fmt: skip


def _named(cls: type[Toy]) -> type[Toy]:
    name = f"toy-{cls.__name__}"
    cls.config_class = dataclass(kw_only=True)(type(f"{cls.__name__}Config", (ToyConfig,), {"method": name}))
    return cls


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for cls in map(_named, TOYS):
        monkeypatch.setitem(registry._registered, cls.config_class.method, cls)
    yield


def make(cls: type[Toy], **settings: Any) -> MethodConfig:
    return cls.config_class(**settings)


full_models = [t for t in zoo.SUPPORTED.values() if not t.all_sliding]
architectures = pytest.mark.parametrize("tiny", full_models, ids=lambda t: t.name)
some = pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
executors = pytest.mark.parametrize("executor", ["torch", "reference"])


def padded(tiny: zoo.TinyModel, side: str = "left") -> tuple[Tensor, dict[str, Tensor]]:
    model = built(tiny.name)
    batch, mask = (zoo.left_pad if side == "left" else zoo.right_pad)(zoo.prompt(model, 3, LENGTH), LENGTHS)
    extra = {"position_ids": zoo.positions(mask)} if tiny.learned_positions else {}
    return batch, {"attention_mask": mask, **extra}


@architectures
@executors
def test_our_executor_equals_dense(tiny: zoo.TinyModel, executor: str) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, LENGTH)
    want = logits(model, ids)
    with patched(model, make(KeepAll, executor=executor)) as patch:
        assert_close("logits", logits(model, ids), want)
        assert all(dict(line.stats.executors) == {executor: 1} for line in patch.report().lines)
        assert patch.report().density() == 1.0


@architectures
@executors
@pytest.mark.parametrize("side", ["left", "right"])
def test_our_executor_equals_dense_with_padding(tiny: zoo.TinyModel, executor: str, side: str) -> None:
    model = built(tiny.name)
    batch, kwargs = padded(tiny, side)
    real = kwargs["attention_mask"].bool()
    want = logits(model, batch, **kwargs)
    with patched(model, make(KeepAll, executor=executor)) as patch:
        assert_close("logits", logits(model, batch, **kwargs)[real], want[real])
        assert not patch.report().fallbacks()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "olmo2"])
@executors
def test_our_executor_in_bfloat16_stays_near_float32(name: str, executor: str) -> None:
    model = zoo.SUPPORTED[name].build().bfloat16()
    with patched(model, [make(KeepAll, executor=executor), make(Recorder)]) as patch:
        logits(model, zoo.prompt(model, 2, LENGTH))
        seen = patch.methods[1].seen
    assert seen
    for call, out, _ in seen:
        assert out.dtype == call.q.dtype == torch.bfloat16
        assert_close(f"layer {call.layer}", out.float(), values_of(call, softmax_of(call)), 2e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "qwen3_next"])
@pytest.mark.parametrize("cls", [RandomBlocks, RandomTokens])
@pytest.mark.parametrize("where", ["plain", "padded", "cached"])
def test_block_maps_equal_the_definition(name: str, cls: type[Toy], where: str) -> None:
    tiny, model = zoo.SUPPORTED[name], built(name)
    out = {}
    for executor in ("torch", "reference"):
        with patched(model, make(cls, executor=executor)) as patch:
            if where == "padded":
                batch, kwargs = padded(tiny)
                got = logits(model, batch, **kwargs)[kwargs["attention_mask"].bool()]
            elif where == "plain":
                got = logits(model, zoo.prompt(model, 2, LENGTH))
            else:
                ids = zoo.prompt(model, 2, LENGTH)
                with torch.no_grad():
                    cache = model(ids[:, :-2], use_cache=True).past_key_values
                    got = torch.cat([model(t, past_key_values=cache).logits for t in ids[:, -2:].split(1, 1)], 1)
            out[executor] = got
            assert patch.report().density() < 0.9 and not patch.report().fallbacks()
    assert_close("logits", out["torch"], out["reference"])


def softmax_of(call: AttentionCall, selection: Selection | None = None) -> Tensor:
    """Weights `[B, Hq, Lq, Lk]` written out by hand."""
    k = call.k.float().repeat_interleave(call.groups, 1)
    scores = call.scale * call.q.float() @ k.mT
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    keep = (selection or Causal()).mask(call.layout)
    scores = scores.masked_fill(~keep, -torch.inf)
    if call.sinks is not None:
        extra = call.sinks.detach().float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def values_of(call: AttentionCall, weights: Tensor) -> Tensor:
    """Head outputs `[B, Lq, Hq, Dv]` for given weights."""
    return (weights @ call.v.float().repeat_interleave(call.groups, 1)).transpose(1, 2)


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
        mp.setitem(registry._registered, "toy-Again", _named(other))
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
def test_routed_rows_equal_rows_alone(name: str, where: str) -> None:
    tiny, model = zoo.SUPPORTED[name], built(name)
    lengths = [LENGTH] * 6 if where == "plain" else [LENGTH, 26, 26, 33, LENGTH, 19]
    ids = zoo.prompt(model, len(lengths), LENGTH)
    batch, mask = zoo.left_pad(ids, lengths)
    pos = {"position_ids": zoo.positions(mask)} if tiny.learned_positions else {}
    extra = {"attention_mask": mask, **pos}
    with patched(model, make(Router)) as patch:
        got = logits(model, batch, **extra)
        density = patch.report().density()
        for row, n in enumerate(lengths):
            assert_close(f"row {row}", got[row][mask[row].bool()], logits(model, ids[row : row + 1, :n])[0])
    assert 0.3 < density < 0.99


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_route_is_kept_from_prefill_to_decode(name: str) -> None:
    model = built(name)
    lengths = [LENGTH, 30, 30, LENGTH]
    ids = zoo.prompt(model, 4, LENGTH)
    batch, mask = zoo.left_pad(ids, lengths)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with patched(model, make(Router)) as patch:
        router = patch.methods[0]
        got = model.generate(batch, attention_mask=mask, **how)[:, LENGTH:]
        assert router.decided == 2 * len(patch.layers)
        for row, n in enumerate(lengths):
            one = ids[row : row + 1, :n]
            assert torch.equal(got[row], model.generate(one, attention_mask=torch.ones_like(one), **how)[0, n:])


@architectures
def test_routing_everything_to_dense_changes_no_bit(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    batch, kwargs = padded(tiny)
    want = logits(model, batch, **kwargs)
    with patched(model, make(DenseRouter)):
        assert torch.equal(logits(model, batch, **kwargs), want)


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


def test_two_routers_on_one_layer_are_refused() -> None:
    model = built("llama")
    with (
        pytest.raises(IncompatibleMethodsError, match=r"'toy-Router' and 'toy-DenseRouter'"),
        patched(model, [make(Router), make(DenseRouter)]),
    ):
        pass
    with patched(model, [make(Router, layers=0), make(DenseRouter, layers="1-")]) as patch:
        assert patch.layers == [0, 1, 2]


def test_two_executors_on_one_layer_are_refused() -> None:
    model = built("llama")
    asks = [StreamingConfig(sink=1, window=4, executor=name) for name in ("torch", "reference")]
    routed = FluxConfig(executor="torch", sparse_settings={"executor": "reference"})
    beside = [FluxConfig(sparse_settings={"executor": "torch"}), ZeroTuningConfig(gamma=2.0, executor="reference")]
    for methods in (asks, [*asks[:1], make(Recorder), *asks[1:]], routed, beside):
        with pytest.raises(IncompatibleMethodsError, match=r"executor '\w+'.*for '\w+' on the same layer; name one"):
            hfpatch.patch_model(model, methods)
    for other in (replace(asks[0], layers=0), StreamingConfig(layers="1-")):
        with patched(model, [other, replace(asks[1], layers="1-")]) as patch:
            logits(model, zoo.prompt(model, 1, LENGTH))
            ran = {line.layer: set(line.stats.executors) for line in patch.report().lines}
            assert ran[1] == ran[2] == {"reference"}


def test_an_executor_named_for_a_router_runs_what_it_routes() -> None:
    model = built("llama")
    narrow = {"sink": 1, "window": 4}
    for settings in (
        {"executor": "reference", "sparse_settings": narrow},
        {"sparse_settings": {**narrow, "executor": "reference"}},
    ):
        with patched(model, "flux", sparse_layers="0-", **settings) as patch:
            logits(model, zoo.prompt(model, 1, LENGTH))
            assert all(set(line.stats.executors) == {"reference"} for line in patch.report().lines)


class NewLse(Toy):
    """Halves the output, and says so of the lse, too."""

    needs = frozenset({"lse"})

    def output(self, call: AttentionCall, out: Tensor) -> tuple[Tensor, Tensor]:
        assert call.lse is not None
        return out / 2, call.lse - 1


def test_output_may_change_the_lse_and_later_methods_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "toy-NewLse", _named(NewLse))
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


def test_selections_of_two_methods_are_intersected() -> None:
    model = built("gemma2")
    ids = zoo.prompt(model, 2, LENGTH)
    narrow = registry.make_config("streaming", {"sink": 2, "window": 6})
    out = []
    for executor in ("torch", "reference"):
        with patched(model, [make(RandomTokens, executor=executor), narrow]) as patch:
            out.append(logits(model, ids))
            density = patch.report().density()
    with patched(model, narrow) as patch:
        logits(model, ids)
        assert density < patch.report().density()
    assert_close("logits", *out)
