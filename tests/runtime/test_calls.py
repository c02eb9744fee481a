"""Calls as people's code makes them: keywords, packed rows, weights asked for, whole graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_invariants import assert_close, built
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from hfpatch import patched
from hfpatch.runtime.attention_source import attention_source, keywords_read
from hfpatch.runtime.raw_call import RawCall

STREAMING: dict[str, Any] = {"method": "streaming", "sink": 2, "window": 8}
cases = pytest.mark.parametrize("case", METHODS, ids=str)
IGNORED: dict[str, Any] = {
    "tokenizer": object(), "token_type_ids": torch.zeros(1, 40, dtype=torch.long), "return_loss": True,
    "mm_token_type_ids": torch.zeros(1, 40, dtype=torch.long), "shift_labels": torch.zeros(1, 40, dtype=torch.long),
    "seq_idx": torch.zeros(1, 40, dtype=torch.long), "special_tokens_mask": torch.zeros(1, 40, dtype=torch.long),
    "a_name_of_tomorrow": "x", "indices_of_something": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", IGNORED)
@torch.no_grad()
def test_keywords_the_base_ignores_do_not_matter(name: str) -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, 40)
    with patched(model, **STREAMING) as patch:
        want = model(ids).logits
        try:
            got = model(ids, **{name: IGNORED[name]}).logits
        except (TypeError, ValueError):
            pytest.skip("this release refuses the keyword itself")
        assert torch.equal(got, want) and not patch.report().fallbacks()


def reading(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float = 1.0, tilt: Any = None, **kw: Any
) -> tuple[Tensor, None]:
    """A base function with keywords of its own, read in every way there is."""
    if kw.get("slope") is not None or "shift" in kw:
        scaling = scaling * 0.5
    return passing(module, q, k, v, mask, scaling, **kw)


def passing(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, bend: Any = None, **kw: Any
) -> tuple[Tensor, None]:
    try:
        lean = kw["lean"]
    except KeyError:
        lean = None
    scaling = scaling if bend is None and not lean else 2 * scaling
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling).transpose(1, 2), None


@contextmanager
def implementation(name: str, function: Any, mask: Any) -> Iterator[PreTrainedModel]:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)
    model = zoo.SUPPORTED["llama"].build()
    model.set_attn_implementation(name)
    yield model


@pytest.mark.parametrize("name", ["tilt", "slope", "shift", "bend", "lean"])
@torch.no_grad()
def test_keywords_the_base_reads_run_dense_and_say_so(name: str) -> None:
    with implementation("reading_probe", reading, sdpa_mask) as model:
        ids = zoo.prompt(model, 1, 40)
        want = model(ids, **{name: 1.0}).logits
        with patched(model, **STREAMING) as patch:
            assert torch.equal(model(ids, **{name: 1.0}).logits, want)
            assert patch.report().fallbacks() == {f"the call carries {name}": 3}
            model(ids, tokenizer=object())
            assert patch.report().density() < 1


def test_what_functions_read() -> None:
    assert keywords_read(reading) >= {"tilt", "slope", "shift", "bend", "lean", "scaling"}
    assert keywords_read(len) is None
    names = {"tokenizer", "token_type_ids", "return_loss"}
    for base in ("sdpa", "eager", "flash_attention_2", "flex_attention"):
        scope = attention_source(built("llama").model.layers[0].self_attn).scope
        read = keywords_read(scope["ALL_ATTENTION_FUNCTIONS"].get_interface(base, scope["eager_attention_forward"]))
        assert read is not None and "scaling" in read and not read & names
        assert ("cu_seq_lens_q" in read) == (base == "flash_attention_2")


def varlen(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scaling: float = 1.0,
    position_ids: Any = None,
    **kw: Any,
) -> tuple[Tensor, None]:
    """Flash attention's conventions: no 4-D mask, sequences begin where positions begin again."""
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    start = (position_ids.diff(dim=-1, prepend=position_ids[:, :1]) < 0).cumsum(-1)
    seen = torch.ones(n, n, dtype=torch.bool).tril() & (start[:, :, None] == start[:, None])
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(q, k, v, seen[:, None], scale=scaling).transpose(1, 2), None


@cases
@torch.no_grad()
def test_packed_sequences_without_a_mask_stay_apart(case: MethodCase) -> None:
    with implementation("varlen_probe", varlen, flash_attention_mask) as model:
        ids = torch.cat([zoo.prompt(model, 1, n, seed=n) for n in (40, 25, 33)], 1)
        places = torch.cat([torch.arange(n) for n in (40, 25, 33)])[None]
        want = model(ids, position_ids=places, use_cache=False).logits
        with patched(model, case.name, **case.settings) as patch:
            assert_close("packed", model(ids, position_ids=places, use_cache=False).logits, want)
            reasons = patch.report().fallbacks()
            quiet = case.name in ("dense", "quest", "infiniretri", "head_scale", "gated")
            assert quiet or set(reasons) == {"packed sequences: positions start again and there is no mask"}


@pytest.mark.parametrize(
    "places,again",
    [
        (torch.arange(9)[None], False),
        (torch.arange(5, 14)[None], False),
        (torch.tensor([[0, 1, 2, 0, 1]]), True),
        (torch.tensor([[3, 4, 5, 2, 3]]), True),
        (torch.tensor([[0, 0, 0, 1, 2]]), True),
        (torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]), True),
        (torch.tensor([[0, 1, 5, 6]]), False),
        (torch.tensor([[0, 1, 1, 1, 2]])[None].expand(3, 1, 5), False),
        (torch.tensor([[0, 1, 1, 0, 1]])[None].expand(3, 1, 5), True),
        (torch.tensor([[7]]), False),
    ],
    ids=str,
)
def test_where_positions_start_again(places: Tensor, again: bool) -> None:
    from hfpatch.runtime.packing import starts_again

    assert starts_again(places) is again


def test_a_reason_never_grows_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, 45)
    with torch.no_grad(), patched(model, **STREAMING) as patch:
        cache = model(ids, use_cache=True).past_key_values
        for t in range(4):
            mask = torch.ones(1, 8, 1, 46 + t, dtype=torch.bool)
            model(ids[:, t : t + 1], past_key_values=cache, attention_mask=mask)
        assert patch.report().fallbacks() == {"a mask that differs between heads": 4 * 3}


@pytest.mark.parametrize("where", ["model", "text"])
@torch.no_grad()
def test_weights_asked_for_by_a_config(where: str) -> None:
    model = zoo.SUPPORTED["llama" if where == "model" else "llava"].build(attn_implementation="eager")
    config = model.config if where == "model" else model.config.get_text_config()
    config.output_attentions = True
    ids = zoo.prompt(model, 1, 40)
    plain = model(ids).attentions
    with patched(model, **STREAMING) as patch:
        got = model(ids).attentions
        assert (plain is None) == (got is None) and all(map(torch.equal, plain or (), got or ()))
        assert patch.report().fallbacks() == {"attention weights were asked for": 3}


@torch.no_grad()
def test_continuous_batching_is_called_by_its_name() -> None:
    model = zoo.SUPPORTED["llama"].build()
    q, k = torch.randn(1, 8, 5, 16), torch.randn(1, 2, 9, 16)

    class PagedCache:
        def update(self) -> None: ...

    with patched(model, **STREAMING) as patch:
        layer, runtime = patch._plan[0]
        from hfpatch.runtime.raw_call import Context

        raw = RawCall(layer.module, q, k, k, None, {"is_causal": False}, Context(None, PagedCache()), runtime)
        assert raw.blocker() == "continuous batching, whose cache keeps several sequences in pages"


GRAPHS = [("llama", s, p) for s in (False, True) for p in (False, True)] + [("gpt_oss", True, True)]


@pytest.mark.thin(5)
@pytest.mark.parametrize("name,static,padded", GRAPHS)
@torch.no_grad()
def test_streaming_decodes_in_one_graph(name: str, static: bool, padded: bool) -> None:
    from transformers import DynamicCache, StaticCache

    if name == "gpt_oss" and zoo.RELEASE < (5, 15):
        pytest.skip("its experts do not compile in this release of Transformers")
    model = zoo.SUPPORTED[name].build()
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, 40), [40, 27 if padded else 40])
    whole = torch.cat([mask, mask.new_ones(2, 24)], 1)

    def run(step: Any) -> Tensor:
        cache = StaticCache(model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
        more = {"attention_mask": mask, "position_ids": zoo.positions(mask)} if padded else {}
        out = model(ids, past_key_values=cache, **more).logits[:, -1:].argmax(-1)
        tokens = [out]
        for t in range(40, 45):
            if padded:
                seen = whole[:, : t + 1]
                more = {"attention_mask": seen, "position_ids": zoo.positions(seen)[:, -1:]}
            out = step(out, past_key_values=cache, **more).logits.argmax(-1)
            tokens.append(out)
        return torch.cat(tokens, 1)

    with patched(model, **STREAMING) as patch:
        want = run(model)
        assert "one graph" not in str(patch.report())
        torch._dynamo.reset()
        assert torch.equal(run(torch.compile(model, fullgraph=True, backend="eager")), want)
        assert "one graph are not counted" in str(patch.report())
        torch._dynamo.reset()
