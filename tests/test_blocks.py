"""Tiles and blocks against the causal mask they stand for, also where a call begins inside a tile or a block."""

import random

import pytest
import torch

from hfpatch.core.blocks import Grid, kept_blocks, top_blocks, top_p, within_budget
from hfpatch.core.selection import BlockMap, Causal, Layout

CALLS = [(40, 40), (40, 63), (9, 41), (1, 38)]  # queries, keys
SIZES = [(8, 8), (16, 4), (4, 16), (7, 5)]
grids = pytest.mark.parametrize(
    "grid",
    [Grid(Layout(2, 4, 2, lq, lk, torch.device("cpu")), *sizes) for lq, lk in CALLS for sizes in SIZES],
    ids=lambda g: f"{g.at.Lq}of{g.at.Lk}-{g.block_q}x{g.block_k}",
)


def seen(grid: Grid) -> list[list[torch.Tensor]]:
    """The part of the causal mask that belongs to every tile and block."""
    mask = Causal().mask(grid.at)[0, 0]
    return [list(rows.split(grid.block_k, 1)) for rows in mask.split(grid.block_q, 0)]


@grids
def test_a_grid_says_which_tiles_see_which_blocks(grid: Grid) -> None:
    parts = seen(grid)
    assert (grid.nq, grid.nk) == (len(parts), len(parts[0]))
    assert grid.visible.tolist() == [[bool(part.any()) for part in row] for row in parts]
    inside = [[part.shape[1] == grid.block_k and bool(part.all()) for part in row] for row in parts]
    assert grid.past.tolist() == inside
    assert grid.last.tolist() == [min(n + grid.block_q, grid.at.Lk) - 1 for n in grid.first.tolist()]


@grids
def test_forced_blocks_are_sinks_recent_ones_and_the_tile_s_own(grid: Grid) -> None:
    forced = grid.forced(1, 2)
    for tile, row in enumerate(seen(grid)):
        newest = max(n for n, part in enumerate(row) if part.any())
        for block, part in enumerate(row):
            own = (block + 1) * grid.block_k > int(grid.first[tile])
            want = bool(part.any()) and (block < 1 or block > newest - 2 or own)
            assert bool(forced[tile, block]) == want, (tile, block)


@grids
def test_blocks_are_chosen_by_score_forced_ones_first(grid: Grid) -> None:
    score = torch.rand(1, 2, grid.nq, grid.nk)
    forced, budget = grid.forced(1, 1), torch.full((grid.nq,), 3)
    chosen = top_blocks(grid, score, forced, budget).block_mask(grid.at)
    for head in range(2):
        for tile in range(grid.nq):
            must, may = forced[tile], grid.visible[tile] & ~forced[tile]
            room = max(0, 3 - int(must.sum()))
            best = sorted(may.nonzero()[:, 0].tolist(), key=lambda n: -float(score[0, head, tile, n]))[:room]
            assert chosen[0, head, tile].nonzero()[:, 0].tolist() == sorted(must.nonzero()[:, 0].tolist() + best)
    keep = score > 0.4
    assert torch.equal(kept_blocks(grid, keep).block_mask(grid.at), keep & grid.visible)
    all_kept = within_budget(grid, score, keep, forced, None).block_mask(grid.at)
    assert torch.equal(all_kept, (keep | forced) & grid.visible)
    few = within_budget(grid, score, keep, forced, budget).block_mask(grid.at)
    assert torch.equal(few & all_kept, few) and bool((few | ~forced).all())
    assert torch.equal(few.sum(-1), torch.minimum(all_kept.sum(-1), forced.sum(-1).clamp_min(3)))


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_it(mass: float) -> None:
    weights = torch.rand(5, 12)
    for row, keep in zip(weights, top_p(weights, mass), strict=True):
        kept = row[keep].sort().values
        assert kept.sum() >= mass * row.sum() - 1e-6
        assert mass == 1.0 or kept[1:].sum() < mass * row.sum()
        assert mass == 1.0 or not len(row[~keep]) or row[~keep].max() <= kept[0]


@pytest.mark.parametrize("seed", range(40))
def test_pairs_of_a_block_map_are_those_of_its_mask(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lk = rng.choice([1, 17, 63, 111, 257])
    hkv, b = rng.choice([1, 3]), rng.choice([1, 3])
    at = Layout(b, hkv * rng.choice([1, 4]), hkv, rng.choice([1, lk, rng.randint(1, lk)]), lk, torch.device("cpu"))
    block_q, block_k = rng.choice([1, 5, 16, 64, 300]), rng.choice([1, 7, 16, 64, 300])
    width = -(-lk // block_k)
    shape = (rng.choice([1, b]), rng.choice([1, at.Hkv, at.Hq]), -(-at.Lq // block_q))
    indices = torch.rand(*shape, width).argsort(-1)[..., : rng.randint(1, width)]
    counts = torch.randint(0, indices.shape[-1] + 1, shape, dtype=torch.int32)
    indices = torch.where(torch.arange(indices.shape[-1]) < counts[..., None], indices, 2**30)  # ignored, whatever
    chosen = BlockMap(indices.to(rng.choice([torch.int32, torch.int64])), counts, block_q, block_k)
    mask = chosen.mask(at)
    assert int(chosen.attended(at)) == int(mask.sum()) * (b // mask.shape[0]) * (at.Hq // mask.shape[1])
