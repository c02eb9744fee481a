"""What methods remember rides on the cache: it follows every operation, copies, pickles and dies with it."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from test_invariants import built
from torch import Tensor
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer

from hfpatch import Method, MethodConfig, patched
from hfpatch.config import registry
from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import Causal, Selection
from hfpatch.runtime.cache_state import cache_states

LENGTH = 33


@dataclass(kw_only=True)
class FingerprintConfig(MethodConfig):
    method: ClassVar[str] = "toy-fingerprint"


class Track:
    """A state object with its own idea of reordering and cropping."""

    def __init__(self, length: int, order: list[int] | None = None) -> None:
        self.length, self.order = length, order

    def reorder(self, index: Tensor) -> "Track":
        return Track(self.length, index.tolist())

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)


class Fingerprint(Method):
    """Remembers the last key of the previous call and fails when the cache holds another one for this row."""

    config_class = FingerprintConfig
    stateful = True
    checks = 0

    def select(self, call: AttentionCall) -> Selection:
        if "key" in call.state:
            assert torch.equal(call.state["key"], call.k[:, :, call.state["at"][0]])
            self.checks += 1
        elif call.phase == "decode":
            raise AssertionError("the state is gone")
        call.state["at"] = [call.Lk - 1] * call.B
        call.state["key"] = call.k[:, :, -1].clone()
        return Causal()


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry._registered, "toy-fingerprint", Fingerprint)
    yield


def filled(batch: int = 3, cache: Any = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A cache with keys and one state over rows (0, 2) and (1,), if the batch allows."""
    cache = cache or DynamicCache()
    keys = torch.arange(float(batch)).view(batch, 1, 1, 1).expand(batch, 2, 5, 4).clone()
    cache.update(keys, keys.clone(), 0)
    states = cache_states(cache, 0, "attn")
    states[(0, 2)] = {"t": torch.tensor([10, 12]), "l": ["a", "c"], "n": 7, "track": Track(5)}
    states[(1,)] = {"t": torch.tensor([11]), "l": ["b"], "n": 8, "track": Track(5)}
    return cache, states


def by_row(cache: Any) -> dict[int, tuple[int, str, int]]:
    """Row -> (tensor entry, list entry, shared value), read through the public function."""
    out = {}
    for rows, state in cache_states(cache, 0, "attn").items():
        for n, row in enumerate(rows):
            out[row] = (int(state["t"][n]), state["l"][n], state["n"])
    return out


A, B, C = (10, "a", 7), (11, "b", 8), (12, "c", 7)


@pytest.mark.parametrize("source", [[0, 1, 2], [2, 1, 0], [2, 2, 1], [1, 1, 1], [0, 0, 2]])
def test_reorder(source: list[int]) -> None:
    cache, _ = filled()
    cache.reorder_cache(torch.tensor(source))
    assert by_row(cache) == {new: (A, B, C)[old] for new, old in enumerate(source)}
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == source


def test_a_router_and_its_children_keep_states_over_the_same_rows() -> None:
    """The router remembers for all rows, each child for its own; both follow, and share one dict when rows agree."""
    cache, states = filled()
    states[(0, 1, 2)] = {"route": ["x", "y", "z"]}
    cache.reorder_cache(torch.tensor([1, 2, 2]))
    moved = cache_states(cache, 0, "attn")
    assert moved[0, 1, 2] == {"route": ["y", "z", "z"]}
    assert moved[1, 2]["l"] == ["c", "c"] and moved[0,]["l"] == ["b"]
    cache.reorder_cache(torch.tensor([1, 2, 1]))
    moved = cache_states(cache, 0, "attn")
    assert list(moved) == [(0, 1, 2)] and moved[0, 1, 2]["route"] == ["z"] * 3
    assert moved[0, 1, 2]["l"] == ["c"] * 3


def test_batch_operations() -> None:
    cache, _ = filled()
    cache.batch_repeat_interleave(2)
    assert by_row(cache) == {0: A, 1: A, 2: B, 3: B, 4: C, 5: C}
    cache.batch_select_indices(torch.tensor([4, 2]))
    assert by_row(cache) == {0: C, 1: B}
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [2.0, 1.0]


def test_selecting_rows_by_a_boolean_mask() -> None:
    cache, _ = filled()
    cache.batch_select_indices(torch.tensor([False, True, True]))
    assert by_row(cache) == {0: B, 1: C}


def test_objects_reorder_and_crop_themselves() -> None:
    cache, _ = filled()
    cache.crop(-2)
    assert {s["track"].length for s in cache_states(cache, 0, "attn").values()} == {3}
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    assert cache_states(cache, 0, "attn")[0, 2]["track"].order == [1, 0]


def test_reset_forgets() -> None:
    cache, _ = filled()
    cache.reset()
    assert cache_states(cache, 0, "attn") == {}


def test_the_layer_stays_what_it_was() -> None:
    cache, _ = filled()
    layer = cache.layers[0]
    assert isinstance(layer, DynamicLayer) and layer.get_seq_length() == 5
    static = StaticCache(built("llama").config, max_cache_len=8)
    cache_states(static, 0, "attn")["rows"] = {}
    assert isinstance(static.layers[0], cache_utils.StaticLayer)
    assert not hasattr(static.layers[0], "batch_repeat_interleave")


FEW_TYPES = {"full_attention": DynamicLayer, "sliding_attention": cache_utils.DynamicSlidingWindowLayer}
LAYER_TYPES = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", FEW_TYPES)  # the mapping came after 5.2


@pytest.mark.parametrize("name", sorted(LAYER_TYPES))
def test_every_kind_of_cache_layer_can_carry_states(name: str) -> None:
    cls = LAYER_TYPES[name]
    try:
        layer = cls(sliding_window=4)
    except TypeError:
        layer = cls()
    cache = DynamicCache()
    cache.layers = [layer]
    cache_states(cache, 0, "attn")[0,] = {"t": torch.tensor([1])}
    assert isinstance(layer, cls) and cache_states(copy.deepcopy(cache), 0, "attn")[0,]["t"].item() == 1


def test_layer_types_of_transformers_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    if LAYER_TYPES is FEW_TYPES:
        pytest.skip("this release has no table of layer types")
    monkeypatch.setattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING))
    own = type("OwnLayer", (DynamicLayer,), {"_layer_type": "toy_attention"})
    cache = DynamicCache()
    cache.layers = [own()]
    cache_states(cache, 0, "attn")
    assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["toy_attention"] is own


def test_copies_are_independent() -> None:
    cache, states = filled()
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 1, 1]))
    states[(1,)]["n"] = 9
    assert by_row(cache) == {0: A, 1: (11, "b", 9), 2: C}
    assert by_row(twin) == {0: B, 1: B, 2: B}
    assert isinstance(twin.layers[0], DynamicLayer)


LOADER = """
import pickle, sys
cache = pickle.load(open(sys.argv[1], "rb"))
from hfpatch.runtime.cache_state import cache_states
from transformers.cache_utils import DynamicLayer
assert isinstance(cache.layers[0], DynamicLayer) and cache.get_seq_length() == 5
assert cache_states(cache, 0, "attn")[0, 2]["t"].tolist() == [10, 12]
"""


def test_pickle_here_and_in_another_process(tmp_path: Any) -> None:
    cache, states = filled()
    for state in states.values():
        del state["track"]
    assert by_row(pickle.loads(pickle.dumps(cache))) == by_row(cache)
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(cache))
    done = subprocess.run([sys.executable, "-c", LOADER, str(tmp_path / "cache.pkl")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_states_die_with_the_cache() -> None:
    cache, states = filled()
    track = states[(1,)]["track"]
    gone = weakref.ref(track)
    del track, states, cache
    gc.collect()
    assert gone() is None


def test_no_cache_gives_a_fresh_state_each_time() -> None:
    cache_states(None, 0, "attn")["rows"] = {}
    assert cache_states(None, 0, "attn") == {}
    assert cache_states(DynamicCache(), 3, "attn") == {}


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "group of samples": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    "name,how",
    [
        (name, how)
        for name in ("llama", "gemma2", "deepseek_v3", "falcon_h1", "qwen3_next")
        for how in HOW
        if name in zoo.SUPPORTED and not (zoo.SUPPORTED[name].hybrid and "chunk" in how)  # they prefill at once
    ],
)
def test_states_follow_generate(name: str, how: str, padded: bool) -> None:
    """Every row finds its own key again at each step, whatever beam search did to the rows."""
    model = built(name)
    ids = zoo.prompt(model, 3, LENGTH)
    batch, mask = zoo.left_pad(ids, [LENGTH, 20, 20]) if padded else (ids, torch.ones_like(ids))
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **HOW[how]}
    try:
        plain = model.generate(batch, **kwargs)
        cache = getattr(model(ids, use_cache=True), zoo.cache_name(model))
    except (AttributeError, KeyError):
        pytest.skip("this release has no such cache for the model")
    if not hasattr(cache, "layers"):
        pytest.skip("this release gives the model a cache without layers, where nothing is remembered")
    with patched(model, "toy-fingerprint") as patch:
        got = model.generate(batch, **kwargs)
        assert patch.methods[0].checks >= 5 * len(patch.layers)
        assert not patch.report().fallbacks()
    assert how == "group of samples" or torch.equal(got, plain)


def test_prompt_lookup_crops_the_state_with_the_cache() -> None:
    """After a crop the remembered key may be cut off; a state object hears of it."""
    model = built("llama")
    ids = zoo.prompt(model, 1, 9).repeat(1, 4)
    lengths: list[tuple[int, int]] = []

    class Follower(Fingerprint):
        def select(self, call: AttentionCall) -> Selection:
            track = call.state.setdefault("track", Track(0))
            lengths.append((track.length, call.off))
            track.length = call.Lk
            return Causal()

    with pytest.MonkeyPatch.context() as mp:
        mp.setitem(registry._registered, "toy-fingerprint", Follower)
        with patched(model, "toy-fingerprint", layers=0):
            model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=zoo.VOCAB)
    assert len(lengths) > 2 and all(length == off for length, off in lengths)


@pytest.mark.parametrize("split", [[LENGTH, LENGTH, LENGTH], [LENGTH, LENGTH - 4, LENGTH - 4]], ids=["same", "split"])
def test_a_prompt_repeated_for_several_questions_keeps_its_state(split: list[int]) -> None:
    """The rows of one prompt keep its state when their questions have different lengths (right-padded)."""
    model = built("llama")
    ids = zoo.prompt(model, 1, 20)
    asked = torch.cat([ids.expand(3, -1), zoo.prompt(model, 3, LENGTH - 20, seed=1)], 1)
    batch, mask = zoo.right_pad(asked, split)
    with patched(model, "toy-fingerprint") as patch, torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        model(batch[:, 20:], attention_mask=mask, past_key_values=cache)
        assert patch.methods[0].checks == len(patch.layers) * sum(n - 20 for n in set(split)), "token by token"
