"""A budget means the same in every method that chooses key blocks, and a question is dense in every sparse prefill."""

import dataclasses
from typing import Any

import pytest
import torch
from method_calls import chosen_mask, make_call, make_method
from methods_list import METHODS
from torch import Tensor

from hfpatch.config.registry import get_method, list_methods
from hfpatch.core.block_selector import BlockSelector
from hfpatch.core.blocks import Grid
from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import BlockMap, Layout

# settings by which nothing but the budget bounds the choice, and what is then forced far beyond any budget here
BUDGETED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "block_topk": ({}, {"sink_blocks": 99, "window_blocks": 99}),
    "flash_prefill": ({"alpha": 0.0}, {"sink_blocks": 99, "window_blocks": 99}),
    "sampled": ({"top_p": 1.0}, {"sink_blocks": 99, "window_blocks": 99}),
    "vertical_slash": ({"vertical": 1.0}, {"sink": 3000, "local": 3000}),
    "xattention": ({"top_p": 1.0, "stride": 8}, {"sink_blocks": 99, "window_blocks": 99}),
}
SHAPES = {
    "257": ((1, 4, 4, 257, 257), 16),
    "257-gqa": ((3, 6, 2, 257, 257), 16),
    "1000-gqa": ((3, 4, 2, 1000, 1000), 32),
    "chunk": ((1, 4, 2, 400, 1003), 32),
    "4096": ((1, 2, 1, 4096, 4096), None),
}
QUESTIONED = {*BUDGETED, "pattern", "skip_softmax", "streaming"}
names = pytest.mark.parametrize("name", BUDGETED)
shapes = pytest.mark.parametrize("shape", SHAPES)


def keys_of_queries(name: str, shape: str, **settings: Any) -> tuple[AttentionCall, Tensor, Tensor]:
    """The call, keys that its queries see `[B, H, Lq]`, and those of their own blocks alone `[Lq]`."""
    sizes, block = SHAPES[shape]
    call = make_call(sizes)
    blocks = {} if block is None else {"block_q": block, "block_k": block}
    selection = make_method(name, min_length=0, **{**BUDGETED[name][0], **blocks, **settings}).select(call)
    assert isinstance(selection, BlockMap)
    kept = selection.block_mask(call.layout)  # [B, H, nQ, nK]
    tile = torch.arange(call.Lq) // selection.block_q
    starts = torch.arange(kept.shape[-1]) * selection.block_k
    sizes_seen = (call.q_pos[:, None] + 1 - starts).clamp(0, selection.block_k)  # [Lq, nK]
    keys = (kept[:, :, tile] * sizes_seen).sum(-1)
    first = (call.off + tile * selection.block_q) // selection.block_k * selection.block_k
    return call, keys, call.q_pos + 1 - first


def test_every_method_with_a_budget_is_here() -> None:
    with_budget = {
        name for name in list_methods()
        if issubclass(get_method(name), BlockSelector)
        and "budget" in {f.name for f in dataclasses.fields(get_method(name).config_class)}
    }  # fmt: skip
    assert with_budget == set(BUDGETED)


@names
@shapes
@pytest.mark.parametrize("share", [0.25, 0.125, 0.6])
@pytest.mark.parametrize("greedy", [False, True], ids=["", "all-forced"])
def test_a_share_is_the_density_that_is_counted(name: str, shape: str, share: float, greedy: bool) -> None:
    more = BUDGETED[name][1] if greedy else {}
    call, keys, own = keys_of_queries(name, shape, budget=share, floor=0, **more)
    density = float(keys.sum() / (keys[..., 0].numel() * (call.q_pos + 1).sum()))
    assert abs(density - share) <= 0.1 * share
    extra = keys - share * (call.q_pos + 1)  # blocks are whole, and a tile's queries see as many of them
    size = float(own.max())
    assert float(extra.max()) <= 2 * size and float(extra.min()) >= -2 * size


@names
@shapes
@pytest.mark.parametrize("floor", [40, 100])
def test_no_query_is_starved_below_the_floor(name: str, shape: str, floor: int) -> None:
    call, keys, own = keys_of_queries(name, shape, budget=0.1, floor=floor)
    assert bool((keys >= (call.q_pos + 1).clamp(max=floor)).all())
    size = float(own.max())
    assert bool((keys <= (0.1 * (call.q_pos + 1)).clamp(min=floor) + 2 * size).all())


@names
@shapes
@pytest.mark.parametrize("budget", [70, 128, 233])
@pytest.mark.parametrize("greedy", [False, True], ids=["", "all-forced"])
def test_tokens_are_the_most_that_a_query_sees(name: str, shape: str, budget: int, greedy: bool) -> None:
    more = BUDGETED[name][1] if greedy else {}
    call, keys, own = keys_of_queries(name, shape, budget=budget, floor=1 << 20, **more)
    assert bool((keys <= own.clamp(min=budget)).all())
    block = SHAPES[shape][1] or 128
    least = (call.q_pos + 1).clamp(max=budget - 2 * block)  # whole blocks, and a tile's last query sees the most
    assert bool((keys >= least).all())


@pytest.mark.parametrize("case", [case for case in METHODS if case.name in QUESTIONED], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 2, 111, 111), (1, 4, 1, 50, 161)], ids=["prefill", "chunk"])
def test_a_question_is_dense_and_changes_no_query_before_it(case: Any, shape: tuple[int, ...]) -> None:
    call = make_call(shape)  # type: ignore[arg-type]
    asking = 13
    method = make_method(case.name, **{**case.settings, "question_tokens": asking})
    keep, n = chosen_mask(method, call), call.Lq - asking
    causal = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)
    assert bool((keep[:, :, n:] == causal[n:]).all())
    before = make_method(case.name, **{**case.settings, "question_tokens": 0})
    assert torch.equal(keep[:, :, :n, : call.off + n], chosen_mask(before, call.first(n)))
    assert not bool(keep[:, :, :n, call.off + n :].any()) and not bool(chosen_mask(before, call)[:, :, n:].all())
    longer = make_method(case.name, **{**case.settings, "question_tokens": 1 << 30})
    assert torch.equal(chosen_mask(longer, call), causal.expand_as(keep))


def test_every_sparse_prefill_takes_a_question() -> None:
    elsewhere = {"dense", "flux", "infiniretri"}  # nothing to choose, or a method in it chooses
    sparse = {
        name for name in list_methods()
        if "select" in get_method(name).points() and "prefill" in get_method(name).acts_in and name not in elsewhere
    }  # fmt: skip
    for name in sparse:
        assert "question_tokens" in {f.name for f in dataclasses.fields(get_method(name).config_class)}, name
    assert sparse - {"dhsa"} == QUESTIONED


@pytest.mark.parametrize("budget", [1, 40, 200, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (64, 16), (128, 32)], ids=str)
def test_no_tile_gets_more_blocks_than_sizes_alone_allow(budget: int | float, sizes: tuple[int, int]) -> None:
    for lq, lk, floor, sink, window in (
        (257, 257, 0, 1, 2),
        (100, 403, 90, 0, 1),
        (1, 300, 0, 3, 9),
        (40, 41, 9, 0, 0),
    ):
        grid = Grid.of(Layout(1, 1, 1, lq, lk, torch.device("cpu")), *sizes)
        given = grid.budget(budget, floor)
        least = int(torch.maximum(given, grid.forced(sink, window, given).sum(-1)).minimum(grid.visible.sum(-1)).max())
        assert least <= grid.most(budget, floor, sink + window) <= grid.nk
