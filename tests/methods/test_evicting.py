"""Methods that drop keys: their sets against plain readings of the papers, when they act, and how much stays."""

import dataclasses
from typing import Any

import pytest
import torch
from method_calls import make_call, make_method
from torch import Tensor

from hfpatch import ConfigError
from hfpatch.core.call import AttentionCall, Held
from hfpatch.core.places import best_places, pyramid

SHAPES = {
    "mha": (1, 4, 4, 63, 63),
    "gqa4": (3, 8, 2, 71, 71),
    "mqa": (1, 8, 1, 63, 63),
    "chunk": (2, 4, 2, 20, 80),
    "fewer queries than the window": (1, 4, 2, 5, 63),
}
SETTINGS: dict[str, Any] = {"budget": 30, "sink": 3, "window": 8, "interval": 4, "evict": "both"}
SCALE = 0.31


def call_of(shape: str, **fields: Any) -> AttentionCall:
    call = make_call(SHAPES[shape], dv=24, **fields)
    return dataclasses.replace(call, scale=SCALE)


def kept(method: str, call: AttentionCall, **settings: Any) -> Tensor:
    """Index `[B, Hc, n]` of what stays."""
    answer = make_method(method, **{**SETTINGS, **settings}).retain(call)
    assert answer is not None and answer.recent == 8 and answer.room == 4
    return answer.index


def plain_set(score: list[float], budget: int, sink: int, window: int) -> list[int]:
    """The first, the last, and the best between; of equal ones the earlier."""
    length = len(score)
    between = sorted(range(sink, length - window), key=lambda j: (-score[j], j))
    return sorted([*range(sink), *between[: budget - sink - window], *range(length - window, length)])


def snapkv(call: AttentionCall, row: int, kv: int, window: int, kernel: int, pooling: str) -> list[float]:
    """SnapKV's score of every key, in words: what the window's queries pay it, pooled, mean over the group's heads."""
    groups = call.Hq // call.Hkv
    total = torch.zeros(call.Lk, dtype=torch.float64)
    for head in range(kv * groups, (kv + 1) * groups):
        received = torch.zeros(call.Lk, dtype=torch.float64)
        some = min(window, call.Lq)
        for n in range(call.Lq - some, call.Lq):
            logits = SCALE * call.k[row, kv].double() @ call.q[row, head, n].double()
            if call.softcap is not None:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            if call.bias is not None:
                logits = logits + call.bias[row, head].double()
            seen = call.off + n + 1
            sink = 0.0 if call.sinks is None else float(call.sinks[head].double().exp())
            power = logits[:seen].exp()
            received[:seen] += power / (power.sum() + sink) / some
        candidates = received[: call.Lk - window]
        for j in range(len(candidates)):
            near = candidates[max(0, j - kernel // 2) : j + kernel // 2 + 1]
            total[j] += (near.mean() if pooling == "average" else near.max()) / groups
    return total.tolist()


def keydiff(keys: Tensor) -> list[float]:
    """Minus the cosine between each of `keys [L, D]` and their mean direction."""
    directions = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    mean = directions.mean(0)
    return [-float(d @ mean / mean.norm()) for d in directions]


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 63])
@pytest.mark.parametrize("shape", SHAPES)
def test_snapkv_keeps_what_the_last_queries_attended_to(shape: str, kernel: int, pooling: str) -> None:
    call = call_of(shape)
    got = kept("snapkv", call, kernel=kernel, pooling=pooling, evict="prompt", interval=4)
    for row in range(call.B):
        for kv in range(call.Hkv):
            want = plain_set(snapkv(call, row, kv, 8, kernel, pooling), 30, 3, 8)
            assert got[row, kv].tolist() == want


@pytest.mark.parametrize("elements", [1, 1 << 24], ids=["head by head", "all heads at once"])
def test_snapkv_counts_soft_caps_sinks_and_biases(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfpatch.methods.snapkv.CHUNK_ELEMENTS", elements)
    plain = call_of("gqa4")
    bias = 4 * torch.randn(plain.B, plain.Hq, plain.Lk, generator=torch.Generator().manual_seed(1))
    call = dataclasses.replace(plain, softcap=2.0, sinks=torch.linspace(-3, 5, plain.Hq), bias=bias)
    got = kept("snapkv", call)
    assert got[1, 1].tolist() == plain_set(snapkv(call, 1, 1, 8, 5, "average"), 30, 3, 8)
    assert not torch.equal(got, kept("snapkv", plain))


def test_a_pool_at_the_end_is_over_the_neighbours_there_are() -> None:
    """With equal scores nobody is preferred: zero padding would favour the middle over the key before the window."""
    call = call_of("mha")
    call = dataclasses.replace(call, q=torch.zeros_like(call.q))
    assert kept("snapkv", call)[0, 0].tolist() == [*range(22), *range(55, 63)]


@pytest.mark.parametrize("shape", SHAPES)
def test_keydiff_keeps_the_keys_least_like_the_mean(shape: str) -> None:
    call = call_of(shape)
    got = kept("keydiff", call)
    for row in range(call.B):
        for kv in range(call.Hkv):
            assert got[row, kv].tolist() == plain_set(keydiff(call.k[row, kv]), 30, 3, 8)


def test_latent_caches_have_one_set() -> None:
    """The cache of latent attention has one head: scores of its own content, or the mean over all heads."""
    content = torch.randn(3, 1, 71, 20)
    call = dataclasses.replace(call_of("gqa4"), held=Held(1, lambda: content, lambda: None))
    assert kept("keydiff", call)[1, 0].tolist() == plain_set(keydiff(content[1, 0]), 30, 3, 8)
    scores = [torch.tensor(snapkv(call, 1, kv, 8, 5, "average")) for kv in range(2)]
    got = kept("snapkv", call)
    assert got.shape == (3, 1, 30) and got[1, 0].tolist() == plain_set((scores[0] + scores[1]).tolist(), 30, 3, 8)


@pytest.mark.parametrize("method", ["snapkv", "keydiff"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sets_are_ascending_hold_both_ends_and_are_of_the_budget(method: str, dtype: torch.dtype, shape: str) -> None:
    call = call_of(shape)
    call = dataclasses.replace(call, **{n: 50 * getattr(call, n).to(dtype) for n in "qkv"})
    for budget in (12, 30, 0.5):
        index = kept(method, call, budget=budget)
        assert index.shape[-1] == (budget if isinstance(budget, int) else -(-call.Lk // 2))
        assert (index.diff(dim=-1) > 0).all() and index.min() == 0 and index.max() == call.Lk - 1
        assert (index[..., :3] == torch.arange(3)).all()
        assert (index[..., -8:] == torch.arange(call.Lk - 8, call.Lk)).all()


def test_sink_and_window_stay_whatever_the_share_and_a_long_interval_has_little_room() -> None:
    call = call_of("mha")
    answer = make_method("keydiff", **{**SETTINGS, "budget": 0.05, "interval": 5000}).retain(call)
    assert answer is not None and answer.index[0, 0].tolist() == [0, 1, 2, *range(55, 63)]
    assert answer.room == 128


@pytest.mark.parametrize("method", ["snapkv", "keydiff"])
def test_when_keys_are_dropped(method: str) -> None:
    def drops(evict: str, lq: int, lk: int, gone: int = 0) -> bool:
        call = dataclasses.replace(make_call((1, 4, 2, lq, lk)), dropped=gone)
        return make_method(method, **{**SETTINGS, "evict": evict}).retain(call) is not None

    for evict, prompt, decode in (("prompt", True, False), ("decode", False, True), ("both", True, True)):
        assert drops(evict, 63, 63) == prompt and not drops(evict, 30, 30)
        assert drops(evict, 2, 2) is False and drops(evict, 20, 50, 99) == prompt, "later turns"
        assert not drops(evict, 3, 50) and not drops(evict, 3, 50, 99), "guesses"
        assert drops(evict, 1, 34, 99) == decode and not drops(evict, 1, 33, 99)


def test_decode_steps_are_scored_by_the_queries_since() -> None:
    """The queries of steps are remembered, and follow beams and tokens taken back."""
    whole = make_call((2, 4, 2, 40, 40))
    method = make_method("snapkv", **{**SETTINGS, "evict": "decode"})
    states: dict[Any, Any] = {}

    def step(stop: int, seen: int) -> Tensor | None:
        call = whole.first(stop)
        call = dataclasses.replace(call, q=call.q[:, :, seen:], rows=(0, 1), states=states)
        answer = method.retain(call)
        return None if answer is None else answer.index

    assert step(30, 0) is None
    for n in range(30, 33):
        assert step(n + 1, n) is None
    (kept_queries,) = states[0, 1].values()
    assert torch.equal(kept_queries.queries, whole.q[:, :, 25:33])
    assert torch.equal(kept_queries.reorder(torch.tensor([1, 1])).queries[0], whole.q[1, :, 25:33])
    kept_queries.crop(31)
    assert torch.equal(kept_queries.queries, whole.q[:, :, 25:31])
    for n in (31, 32, 33):
        got = step(n + 1, n)
    last = dataclasses.replace(whole.first(34), q=whole.q[:, :, 26:34])
    want = make_method("snapkv", **SETTINGS).retain(last)
    assert got is not None and want is not None and torch.equal(got, want.index)


@pytest.mark.parametrize("layers", [2, 4, 24])
@pytest.mark.parametrize("length", [70, 100, 190, 5000])
def test_a_pyramid_keeps_the_budget_on_average(layers: int, length: int) -> None:
    sizes = [pyramid(64, 8, length, n, layers) for n in range(layers)]
    assert sizes == sorted(sizes, reverse=True) and all(8 <= n <= length for n in sizes)
    assert sum(sizes) / layers == pytest.approx(64, abs=1) and sizes[0] > sizes[-1]
    if length > 200:
        assert sizes[0] == 8 + 2 * 56 - 2 and sizes[-1] == 8 + 2, "beta is 20"


def test_budgets_of_layers_are_of_those_that_drop_keys() -> None:
    method = make_method("keydiff", **{**SETTINGS, "layers_budget": "pyramid"})
    method.prepare(type("Model", (), {"config": type("C", (), {"get_text_config": lambda self: self})()})(), [5, 3, 9])
    call = call_of("mha")
    sizes = [method.retain(dataclasses.replace(call, layer=n)).index.shape[-1] for n in (3, 5, 9, 7)]
    assert sizes == [pyramid(30, 11, 63, n, 3) for n in range(3)] + [30]


def test_ties_go_to_the_earlier_key_whatever_the_length() -> None:
    for length in (20, 200, 2000):
        assert best_places(torch.zeros(1, 1, length), 12, 2, 4)[0, 0].tolist() == [
            *range(8),
            *range(length, length + 4),
        ]


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"budget": 68}, "leaves nothing to choose beside sink and window, 68 tokens"),
        ({"budget": 1.5}, "a share of the keys is at most"),
        ({"evict": "never"}, "is not one of"),
        ({"kernel": 4}, "make it odd"),
        ({"window": 0}, "out of range"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_method("snapkv", **settings)


def test_streaming_with_a_cropped_cache_never_looks_back() -> None:
    for settings in ({"phase": "decode"}, {"question_tokens": 5}):
        with pytest.raises(ConfigError, match="never look back"):
            make_method("streaming", crop_cache=True, **settings)
    with pytest.raises(ConfigError, match="its own crop_cache"):
        make_method("flux", sparse_settings={"crop_cache": True})
