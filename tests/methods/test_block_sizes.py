"""Blocks, pages, strides, windows and estimates far longer than the prompt cost no more than ones as long as it."""

import time
from typing import Any

import pytest
import torch
from largest import Largest
from method_calls import chosen_mask, make_call, make_method

from hfpatch.core.selection import BlockMap
from hfpatch.methods import vertical_slash
from hfpatch.methods.dhsa.boundaries import Cutting, cut
from hfpatch.methods.infiniretri.scores import QuestionView
from hfpatch.ops import attend

MOST = 2**31 - 1
CALLS = {"prefill": (2, 8, 2, 70, 70), "chunk": (1, 4, 2, 9, 70), "decode": (2, 4, 2, 1, 70)}
ALL: dict[str, Any] = {"min_length": 0}
DHSA: dict[str, Any] = {"sink": 2, "local": 4, "budget": 40, "block_q": 4, "question_tokens": 0}
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("block_topk", {**ALL, "budget": 16, "block_q": 8, "block_k": 8},
     ("block_q", "block_k", "sink_blocks", "window_blocks", "budget")),
    ("flash_prefill",
     {**ALL, "block_q": 8, "block_k": 8, "last_blocks": 0, "sink_blocks": 1, "window_blocks": 1, "alpha": 0.9},
     ("block_q", "block_k", "sink_blocks", "window_blocks", "last_blocks", "budget")),
    ("vertical_slash", {**ALL, "block_q": 8, "block_k": 8, "sink": 2, "local": 2, "vertical": 4, "slash": 4},
     ("block_q", "block_k", "sink", "local", "vertical", "slash", "estimate", "budget")),
    ("xattention", {**ALL, "stride": 1, "block_q": 8, "block_k": 8, "top_p": 0.3},
     ("block_q", "block_k", "sink_blocks", "window_blocks")),
    ("skip_softmax", {**ALL, "block_q": 8, "block_k": 8, "prefill": 0.3, "decode": 0.3}, ("block_q", "block_k")),
    ("quest", {**ALL, "budget": 8, "page": 4}, ("page", "budget")),
    *(("pattern", {"pattern": p, "block": 4, "window_blocks": 1},
       ("block", "window_blocks", "sink_blocks", "stride", "count", "slashes"))
      for p in ("sliding", "slash", "dilated", "power", "s2")),
    ("streaming", {"sink": 2, "window": 8}, ("sink", "window", "question_tokens")),
    *(("dhsa", {**DHSA, "boundaries": b},
       ("chunk", "longest", "boundary_window", "radius", "question_tokens", "close_after", "budget"))
      for b in ("fixed", "novelty", "oracle")),
]  # fmt: skip
SETTINGS = [(name, base, field) for name, base, fields in CASES for field in fields]


def looked_at(method: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """What a method chooses and how large a tensor choosing and attending made."""
    call = make_call(shape)  # type: ignore[arg-type]
    with torch.no_grad(), Largest() as seen:
        selection = method.select(call)
        attend(call.q, call.k, call.v, selection=selection, scale=call.scale)
    return chosen_mask(method, make_call(shape)), seen.elements  # type: ignore[arg-type]


@pytest.mark.parametrize("name,base,field", SETTINGS, ids=lambda x: x if isinstance(x, str) else x.get("pattern", ""))
@pytest.mark.parametrize("shape", CALLS)
def test_the_largest_size_is_as_cheap_as_the_prompt_s(name: str, base: dict, field: str, shape: str) -> None:
    near, far = (make_method(name, **{**base, field: size}) for size in (128, MOST))
    (want, elements), start = looked_at(near, CALLS[shape]), time.perf_counter()
    got, most = looked_at(far, CALLS[shape])
    assert torch.equal(got, want)
    assert most <= 1.2 * elements
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "sizes", [(MOST - 15, MOST - 15, MOST - 15), (16, MOST - 15, 16), (16, 16, MOST - 15)], ids=str
)
def test_xattention_with_strides_and_blocks_beyond_the_prompt(sizes: tuple[int, int, int]) -> None:
    stride, block_q, block_k = sizes
    own = {"stride": stride, "block_q": block_q, "block_k": block_k}
    near = {k: min(v, 128) for k, v in own.items()}
    for shape in CALLS.values():
        got, want = (looked_at(make_method("xattention", min_length=0, top_p=0.3, **s), shape) for s in (own, near))
        assert torch.equal(got[0], want[0]) and got[1] <= 1.2 * want[1]


ANY_SIZE = [(executor, shape) for executor in ("torch", "reference") for shape in CALLS]
ANY_SIZE += [("triton", shape) for shape in CALLS if shape != "prefill"]  # 15 s there; a chunk shows the same


@pytest.mark.parametrize("executor,shape", ANY_SIZE)
def test_executors_take_block_lists_of_any_size(executor: str, shape: str) -> None:
    """A selection of someone else's, which was never cut to the call."""
    if executor == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")
    call = make_call(CALLS[shape])  # type: ignore[arg-type]
    for sizes in ((MOST, MOST), (8, MOST), (MOST, 8)):
        blocks = -(-call.Lk // sizes[1])
        tiles = -(-call.Lq // sizes[0])
        indices = torch.arange(blocks).expand(1, 1, tiles, blocks)
        sel = BlockMap(indices, torch.full((1, 1, tiles), blocks), *sizes)
        want = attend(call.q, call.k, call.v, selection=None, scale=call.scale, executor="reference").out
        with Largest() as seen:
            got = attend(call.q, call.k, call.v, selection=sel, scale=call.scale, executor=executor).out
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert seen.elements < 1 << 20


def test_no_radius_reaches_beyond_the_region() -> None:
    score = torch.randn(2, 70)
    assert torch.equal(cut(score, Cutting(MOST, 4)), cut(score, Cutting(70, 4)))


def test_a_phrase_longer_than_the_text_sums_all_of_it() -> None:
    view = QuestionView(torch.rand(3, 40))
    assert torch.allclose(view.token_scores(5, 30, MOST, None), view.token_scores(5, 30, 50, None))


@pytest.mark.parametrize("last", [1, 7, 150, 300])
def test_vertical_slash_looks_at_a_few_queries_at_a_time(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call((1, 2, 1, 300, 350))
    want = vertical_slash.line_sums(call, last)
    monkeypatch.setattr(vertical_slash, "CHUNK_ELEMENTS", 2 * 350 * 3)
    with Largest() as seen:
        got = vertical_slash.line_sums(call, last)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert seen.elements < 300 * 350 / 4
