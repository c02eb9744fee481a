"""Tiles and blocks against the causal mask they stand for, also where a call begins inside a tile or a block."""

import pytest
import torch

from hfpatch.core.blocks import Grid, kept_blocks, top_blocks, top_p, within_budget
from hfpatch.core.selection import Causal, Layout

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
