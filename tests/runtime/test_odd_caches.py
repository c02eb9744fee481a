"""Modules and caches that do not pair off one to one: states and positions belong to the cache layer in use."""

import copy
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import pytest
import torch
import transformers
import zoo
from test_invariants import assert_close
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama
from zoo_model import randomize

from hfpatch import patched
from hfpatch.runtime.cache_slot import find_slot, has_room, is_cache, tokens_seen

SMALL: dict[str, Any] = {
    "vocab_size": zoo.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False, **zoo.TOKENS,
}  # fmt: skip
ZAMBA2 = {
    **SMALL, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "num_key_value_heads": 4, "attention_hidden_size": 128, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 32, "chunk_size": 16, "adapter_rank": 8,
    "num_mem_blocks": 2,
}  # fmt: skip
HRM = {**SMALL, "num_hidden_layers": 4, "head_dim": 16, "H_cycles": 2, "L_cycles": 2, "prefix_lm": False}
DORY = {
    **SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16,
    "layer_types": ["full_attention"] * 4, "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "zamba2": ("Zamba2", ZAMBA2),
    "hrm_text": ("HrmText", HRM),
    "dory": ("Dory", DORY),
    "dory-last-loop": ("Dory", {**DORY, "recurrent_kv_cache_mode": "last_loop"}),
}
DHSA = {"budget": 24, "sink": 2, "local": 4, "block_q": 4, "chunk": 4, "radius": 2, "window": 2, "question_tokens": 0}
METHODS: dict[str, dict[str, Any]] = {
    "streaming": {"sink": 2, "window": 8},
    "quest": {"min_length": 0, "budget": 16, "page": 4},
    "dhsa": {**DHSA, "boundaries": "fixed"},
}


@cache
def built(name: str) -> PreTrainedModel:
    prefix, config = MODELS[name]
    if not hasattr(transformers, f"{prefix}Config"):
        pytest.skip("this release does not have the model")
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**config)).eval()
    randomize(model)
    try:
        cache = prefill(model, zoo.prompt(model, 1, 9))
    except AttributeError:
        pytest.skip("this release cannot run the model")
    if not hasattr(cache, "layers"):
        pytest.skip("this release gives the model a cache without layers")
    return model


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert float((got - want).abs().max()) < tolerance


def prefill(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Any:
    """The cache of a prompt."""
    return getattr(model(ids, use_cache=True, **kwargs), zoo.cache_name(model))


def step(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Logits of further tokens."""
    return model(ids, use_cache=True, **{zoo.cache_name(model): cache}).logits


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, start: int, **kwargs: Any) -> Tensor:
    """Logits of the tokens from `start` on, one by one after a prefill."""
    cache, parts = prefill(model, ids[:, :start], **kwargs), []
    for t in range(start, ids.shape[1]):
        parts.append(step(model, ids[:, t : t + 1], cache))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cached_and_uncached_logits_agree(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, 45)
    tolerance = 5 * float((decode(model, ids, 40) - model(ids).logits[:, 40:]).abs().max()) + 2e-5
    with patched(model, "streaming", sink=2, window=8) as patch:
        whole = model(ids, use_cache=False).logits[:, 40:]
        got = decode(model, ids, 40)
        reasons = patch.report().fallbacks()
    if name == "dory-last-loop":
        assert set(reasons) == {"keys that are not those of the cache"}
    else:
        assert not reasons and patch.report().density("decode") < 0.6
        close(got, whole, tolerance)


@pytest.mark.parametrize("method", ["quest", "dhsa"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "dory-last-loop"])
@torch.no_grad()
def test_state_belongs_to_the_cache_layer(name: str, method: str) -> None:
    """What was remembered serves as well as what is worked out anew from the keys of the layer."""
    model = built(name)
    ids = zoo.prompt(model, 2, 47)
    with patched(model, method, **METHODS[method]) as patch:
        cache = prefill(model, ids[:, :40])
        for t in range(
            40, 41 if method == "dhsa" else 47
        ):  # dhsa's chunks of generated tokens depend on their history
            other = copy.deepcopy(cache)
            for layer in other.layers:
                vars(layer).pop("hfpatch_states", None)
            a, b = (step(model, ids[:, t : t + 1], c) for c in (cache, other))
            assert_close("logits", a, b)
        assert patch.report().density("decode") < 0.95 and not patch.report().fallbacks()
        assert not any(runtime.notes for _, runtime in patch._plan)


@pytest.mark.parametrize("name", ["zamba2", "hrm_text"])
@torch.no_grad()
def test_padded_rows_equal_rows_alone(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, 40)
    batch, mask = zoo.left_pad(ids, [40, 29])
    plain = model(batch, attention_mask=mask).logits[1, 11:] - model(ids[1:, :29]).logits[0]
    with patched(model, "streaming", sink=2, window=8) as patch:
        got = model(batch, attention_mask=mask).logits[1, 11:]
        assert patch.report().density() < 0.6 and not patch.report().fallbacks()
        close(got, model(ids[1:, :29]).logits[0], 5 * float(plain.abs().max()) + 2e-5)


class Wrapped:
    """A cache that does not look like one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Renamed(modeling_llama.LlamaAttention):
    """Llama's attention of a release that calls the cache `memory`."""

    def forward(self, hidden_states: Tensor, *args: Any, memory: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **{OWN_NAME: getattr(memory, "inner", memory)}, **kwargs)


OWN_NAME = "cache" if "cache" in signature(modeling_llama.LlamaAttention.forward).parameters else "past_key_values"


def of_another_release(wrap: Callable[[Any], Any]) -> PreTrainedModel:
    """A tiny Llama whose attention modules get the cache as `memory`, through `wrap`."""
    model = zoo.SUPPORTED["llama"].build()

    def rename(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.pop(OWN_NAME, None)
        return args, {**kwargs, "memory": None if cache is None else wrap(cache)}

    for layer in model.model.layers:
        layer.self_attn.__class__ = Renamed
        layer.self_attn.register_forward_pre_hook(rename, with_kwargs=True)
    return model


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_cache_is_found_under_any_name(method: str) -> None:
    plain = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(plain, 2, 45)
    with patched(plain, method, **METHODS[method]):
        want = decode(plain, ids, 40)
    model = of_another_release(lambda cache: cache)
    with patched(model, method, **METHODS[method]) as patch:
        assert torch.equal(decode(model, ids, 40), want)
        assert not patch.report().fallbacks()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_cache_nobody_recognises_is_said(method: str) -> None:
    """Keys that come from nowhere: dense, with a reason, in every decode step."""
    model = of_another_release(Wrapped)
    ids = zoo.prompt(model, 2, 45)
    with patched(model, method, **METHODS[method]) as patch:
        decode(model, ids, 40)
        reason = "more keys than queries and no cache that says where they come from"
        assert patch.report().fallbacks()[reason] == 5 * len(patch.layers)
        assert patch.report().density("decode") == 1


def test_what_counts_as_a_cache() -> None:
    class Own:
        def update(self) -> None: ...

        def get_seq_length(self) -> int:
            return 0

    class PagedThing:
        def update(self) -> None: ...

    yes = [DynamicCache(), Own(), PagedThing()]
    no = [None, 3, {}, {"update": 1}, torch.zeros(2), set(), "cache"]
    assert [is_cache(x) for x in yes] == [True] * 3 and not any(map(is_cache, no))


def test_slot_is_the_layer_that_holds_the_keys() -> None:
    cache = DynamicCache()
    key = torch.randn(1, 2, 5, 4)
    held = [cache.update(key.clone(), key.clone(), n)[0] for n in range(3)]
    assert [find_slot(cache, n, held[n]) for n in range(3)] == [0, 1, 2]
    assert [find_slot(cache, n, held[2]) for n in (0, -1, None, 7)] == [2, 2, 2, 2]
    assert find_slot(cache, 1, key) == 1 and find_slot(cache, -1, key) is None and find_slot(cache, None, key) is None
    assert tokens_seen(cache, 2, None, held[2]) == 5 and tokens_seen(cache, None, -1, key) is None


def test_room_is_static() -> None:
    model = zoo.SUPPORTED["llama"].build()
    static = StaticCache(model.config, max_cache_len=8)
    dynamic = DynamicCache()
    dynamic.update(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), 0)
    assert has_room(static, 0, 8) and not has_room(static, 0, 5)
    assert not has_room(dynamic, 0, 8) and not has_room(static, None, 8)


class Silent(DynamicLayer):
    """A layer that holds something, but does not tell how many tokens it has seen."""

    def get_seq_length(self) -> int:
        raise NotImplementedError


def test_a_layer_without_a_length_leaves_it_to_an_earlier_one() -> None:
    keys, cache = torch.randn(1, 2, 5, 4), DynamicCache()
    cache.layers = [DynamicLayer(), Silent(), Silent()]
    for slot in range(3):
        cache.update(keys, keys, slot)
    assert [tokens_seen(cache, slot, slot, keys) for slot in range(3)] == [5, 5, 5]
    cache.layers = cache.layers[1:]
    assert tokens_seen(cache, 1, 1, keys) is None


class Read(StaticCache):
    """Counts how often its length is asked for."""

    asked = 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        return super().get_seq_length(*args, **kwargs)


def test_a_static_cache_is_asked_for_its_length_once_for_all_layers_of_a_pass() -> None:
    cache = Read(zoo.SUPPORTED["llama"].build().config, max_cache_len=8)
    positions, seen = torch.zeros(1, 1, dtype=torch.long), []
    for n in range(2):  # two passes with the same positions, as when a cache is rolled back
        where = {"cache_position": torch.arange(2 * n, 2 * n + 2)}  # releases that are told count what is not 0
        for slot in range(3):
            keys, _ = cache.update(torch.ones(1, 2, 2, 16), torch.ones(1, 2, 2, 16), slot, where)
            seen.append(tokens_seen(cache, slot, slot, keys, positions, asker=slot))
    assert seen == [2] * 3 + [4] * 3 and cache.asked == 2
    assert tokens_seen(cache, 1, 1, keys) == 4 and cache.asked == 3
