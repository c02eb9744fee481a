"""Flux with a cropped cache: the same logits from fewer keys, and no way to use the cache for anything else."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hfpatch import CacheError, ConfigError, UnsupportedModelError, get_patch, patch_model, patched, unpatch_model

SINK, WINDOW, LENGTH = 2, 8, 63
STREAM = {"sink": SINK, "window": WINDOW}
SPARSE = {"sparse": "streaming", "sparse_settings": STREAM}
CROPPED = {**SPARSE, "sparse_layers": "1-", "crop_cache": True}


@torch.no_grad()
def told(model: Any, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of prompt, single tokens, a later turn and single tokens again, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    cuts = [0, 40, 41, 42, 43, 55, 56, ids.shape[1]]
    parts = []
    for a, b in itertools.pairwise(cuts):
        seen = None if mask is None else mask[:, :b]
        parts.append(model(ids[:, a:b], past_key_values=cache, attention_mask=seen).logits)
    return torch.cat(parts, 1), cache


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max() / want.abs().max()) <= 1e-5


def sizes(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


NAMES = ["llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize("name", [n for n in NAMES if n in zoo.SUPPORTED])
def test_same_logits_from_fewer_keys(name: str) -> None:
    model = zoo.SUPPORTED[name].build()
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, "flux", sparse_layers="0-", **SPARSE) as patch:
        want, whole = told(model, ids)
        density = patch.report().density()
        routed = patch.layers
    with patched(model, "flux", sparse_layers="0-", crop_cache=True, **SPARSE) as patch:
        got, cache = told(model, ids)
        assert patch.report().density() == pytest.approx(density)
        assert not patch.report().fallbacks()
    assert close(got, want)
    assert cache.get_seq_length() == LENGTH
    for n, (small, large) in enumerate(zip(cache.layers, whole.layers, strict=True)):
        kept = SINK + WINDOW - 1 if n in routed else large.keys.shape[-2]
        assert small.keys.shape[-2] == small.values.shape[-2] == kept
        if n in routed:
            assert small.keys.untyped_storage().nbytes() == small.keys.numel() * small.keys.element_size()


def test_layers_routed_full_keep_all_their_keys() -> None:
    model = zoo.SUPPORTED["llama"].build()
    with patched(model, "flux", **CROPPED):
        _, cache = told(model, zoo.prompt(model, 1, LENGTH))
    assert sizes(cache) == [LENGTH, SINK + WINDOW - 1, SINK + WINDOW - 1]


def test_left_padded_rows_equal_rows_alone() -> None:
    model = zoo.SUPPORTED["llama"].build()
    lengths = [63, 50, 49]
    ids = zoo.prompt(model, 3, LENGTH)
    batch, mask = zoo.left_pad(ids, lengths)
    with patched(model, "flux", **CROPPED):
        together, cache = told(model, batch, mask)
        assert sizes(cache) == [LENGTH, SINK + WINDOW - 1, SINK + WINDOW - 1]
    with patched(model, "flux", **{**CROPPED, "crop_cache": False}):
        for row, n in enumerate(lengths):
            with torch.no_grad():
                assert close(together[row, -n:], model(ids[row : row + 1, :n]).logits[0])


def test_rows_too_short_for_it_wait_and_mixed_routes_keep_all() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, 30)
    batch, mask = zoo.left_pad(ids, [30, 5])
    with patched(model, "flux", **CROPPED), torch.no_grad():
        cache = model(batch, attention_mask=mask, use_cache=True).past_key_values
        assert sizes(cache) == [30, 30, 30]
        for _ in range(6):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(batch[:, -1:], past_key_values=cache, attention_mask=mask)
        assert sizes(cache) == [36, 9, 9]
    with patched(model, "flux", **CROPPED) as patch, torch.no_grad():
        flux: Any = patch.methods[0]
        flux._decide = lambda call: torch.tensor([True, False])
        assert sizes(model(ids, use_cache=True).past_key_values) == [30, 30, 30]


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_and_beams(beams: int) -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, 40)
    found = []
    for crop in (False, True):
        with patched(model, "flux", **{**CROPPED, "crop_cache": crop}):
            found.append(model.generate(ids, num_beams=beams, max_new_tokens=12, do_sample=False))
    assert torch.equal(*found)


def test_copies_go_on_alone_and_a_reset_cache_begins_anew() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, LENGTH)
    with patched(model, "flux", **CROPPED), torch.no_grad():
        want, cache = told(model, ids)
        step = ids[:, :1]
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        next_want = model(step, past_key_values=cache).logits
        for other in copies:
            assert torch.equal(model(step, past_key_values=other).logits, next_want)
        cache.reset()
        if cache.get_seq_length(1):
            pytest.skip("this release of Transformers does not empty a cache by reset")
        again, _ = told(model, ids, cache=cache)
    assert torch.equal(again, want)


def cropped_cache(model: Any) -> Any:
    with patched(model, "flux", **CROPPED), torch.no_grad():
        return model(zoo.prompt(model, 1, 40), use_cache=True).past_key_values


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "streaming", **STREAM},
        {"method": "flux", **CROPPED, "crop_cache": False},
        {"method": "flux", **CROPPED, "sparse_settings": {"sink": 2, "window": 9}},
        {"method": "flux", **CROPPED, "layers": "0-1"},
    ],
    ids=["unpatched", "another method", "not cropping", "another window", "fewer layers"],
)
def test_another_route_in_a_later_turn_is_refused(settings: dict[str, Any], new: int) -> None:
    model = zoo.SUPPORTED["llama"].build()
    cache = cropped_cache(model)
    ids = zoo.prompt(model, 1, new, seed=3)
    if settings:
        patch_model(model, settings["method"], **{k: v for k, v in settings.items() if k != "method"})
    with pytest.raises(CacheError, match="cropped"), torch.no_grad():
        model(ids, past_key_values=cache)


def test_later_padding_rollback_and_other_caches_are_refused() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, 40)
    with patched(model, "flux", **CROPPED), torch.no_grad():
        cache = cropped_cache(model)
        mask = torch.ones(1, 45, dtype=torch.long)
        mask[:, :3] = 0
        with pytest.raises(CacheError, match="another padding"):
            model(ids[:, :5], past_key_values=cache, attention_mask=mask)
        with pytest.raises(CacheError, match="rolled back"):
            cropped_cache(model).crop(-2)
        with pytest.raises(CacheError, match="DynamicCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        model(ids, use_cache=False)


def test_settings_and_models_that_look_back_are_refused() -> None:
    model = zoo.SUPPORTED["llama"].build()
    for settings in (
        {"sparse": "quest", "sparse_settings": {}},
        {"sparse_settings": {**STREAM, "phase": "prefill"}},
        {"sparse_settings": {**STREAM, "question_tokens": 3}},
    ):
        with pytest.raises(ConfigError, match="crop_cache=True goes with"):
            patch_model(model, "flux", **{**SPARSE, **settings, "crop_cache": True})
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModelError, match="keys of others"):
        patch_model(model, "flux", **CROPPED)


def test_unpatching_leaves_no_trace() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, LENGTH)
    modules = list(model.modules())
    before = [dict(m.__dict__) for m in modules]
    with torch.no_grad():
        want = model(ids).logits
        patch_model(model, "flux", **CROPPED)
        told(model, ids)
        assert get_patch(model).report().density("decode") < 1
        unpatch_model(model)
        assert torch.equal(model(ids).logits, want)
    after = [dict(m.__dict__) for m in modules]
    assert [sorted(d) for d in before] == [sorted(d) for d in after]
    assert all(len(m._forward_pre_hooks) == len(m._forward_hooks) == 0 for m in modules)
    assert all(b["config"] is a["config"] for b, a in zip(before, after, strict=True) if "config" in b)
