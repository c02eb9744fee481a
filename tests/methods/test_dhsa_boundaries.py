"""DHSA's boundaries: against brute force, where topics change, long chunks, the sink's own chunk."""

import pytest
import torch
from dhsa_helpers import call, method
from torch import Tensor

from hfpatch.methods.dhsa import KEY, boundaries
from hfpatch.methods.dhsa.finder import Finder


def test_greedy_suppression_equals_brute_force() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        score = torch.randn(3, 257, generator=g)
        score[torch.rand(3, 257, generator=g) < 0.3] = -torch.inf
        for radius in (0, 1, 3, 8, 300):
            got = boundaries.suppress(score, radius)
            for b in range(3):
                assert got[b].nonzero()[:, 0].tolist() == boundaries.brute_force(score[b].tolist(), radius)


@pytest.mark.parametrize(
    "score", [torch.zeros(2, 500), torch.arange(500.0).expand(2, -1), torch.full((1, 9), -torch.inf)]
)
def test_suppression_of_plateaus_and_ramps_is_a_maximal_set(score: Tensor) -> None:
    kept = boundaries.suppress(score, 4)
    for row, valid in zip(kept, score > -torch.inf, strict=True):
        at = row.nonzero()[:, 0]
        assert (at.diff() > 4).all()
        far = (torch.arange(score.shape[1])[:, None] - at).abs().min(1).values > 4 if len(at) else ~valid
        assert not (far & valid).any()


def test_cap_keeps_the_best_boundaries() -> None:
    score = torch.randn(2, 200)
    flags = boundaries.cut(score, boundaries.Cutting(radius=3, mean=20))
    for row, s in zip(flags, score, strict=True):
        kept = boundaries.brute_force(s.tolist(), 3)
        want = sorted({0, *sorted(kept, key=lambda n: -float(s[n]))[:10]})
        assert row.nonzero()[:, 0].tolist() == want


def test_forced_boundary_ends_the_search() -> None:
    flags = boundaries.cut(torch.randn(2, 100), boundaries.Cutting(radius=3, mean=5), forced=70)
    assert flags[:, 70].all() and not flags[:, 71:].any() and not flags[:, 67:70].any()


def test_novelty_is_the_cosine_of_mean_keys() -> None:
    k = torch.randn(2, 3, 40, 8)
    got = boundaries.novelty(k, 4)
    assert got[:, :4].isneginf().all() and got[:, 37:].isneginf().all()
    for b in range(2):
        for p in range(4, 37):
            left, right = k[b, :, p - 4 : p].mean(1).flatten(), k[b, :, p : p + 4].mean(1).flatten()
            assert abs(float(got[b, p]) - (1 - float(torch.cosine_similarity(left, right, dim=0)))) < 1e-5


def test_novelty_finds_a_change_of_topic() -> None:
    k = torch.randn(1, 1, 90, 16) * 0.1
    k[:, :, :30, 0] += 1
    k[:, :, 30:71, 1] += 1
    k[:, :, 71:, 2] += 1
    flags = boundaries.cut(boundaries.novelty(k), boundaries.Cutting(mean=45))
    assert flags[0].nonzero()[:, 0].tolist() == [0, 30, 71]


def test_long_chunks_are_split_and_lists_are_ragged() -> None:
    flags = torch.zeros(2, 50, dtype=torch.bool)
    flags[0, [0, 7, 40]] = True
    flags[1, 0] = True
    split = boundaries.split_long(flags, 16)
    assert split[0].nonzero()[:, 0].tolist() == [0, 7, 23, 39, 40]
    assert split[1].nonzero()[:, 0].tolist() == [0, 16, 32, 48]
    assert boundaries.to_list(split, 100).tolist() == [[100, 107, 123, 139, 140], [100, 116, 132, 148, 150]]


@pytest.mark.parametrize("boundaries", ["fixed", "novelty"])
def test_no_chunk_mixes_the_sink_with_what_follows(boundaries: str) -> None:
    """The initial keys are always visible and often outliers: they must not speak for the tokens after them."""
    c = call(111, 111)
    c.k[:, :, :7] += 50
    method(boundaries=boundaries, sink=7, budget=48).select(c)
    table = c.state[KEY]
    starts, ends = table.spans
    assert (starts == 7).any(1).all() and not ((starts < 7) & (ends > 7)).any()
    chunk = int((starts[0] == 7).nonzero()[0])
    mean = c.k[0, :, 7 : int(ends[0, chunk])].mean(1)
    torch.testing.assert_close(table.chunks(c.k).statistics[0, :, chunk, :16], mean)


@pytest.mark.parametrize("settings", [
    {"boundaries": "fixed"}, {"boundaries": "fixed", "chunk": 4, "longest": 3}, {}, {"radius": 0, "chunk": 1},
    {"align": 4}, {"longest": 5, "align": 2, "radius": 0, "chunk": 4}, {"sink": 3, "longest": 0, "chunk": 300},
])  # fmt: skip
def test_there_are_no_more_boundaries_than_sizes_allow_and_lists_say_the_same(settings: dict) -> None:
    c = call(257, 257)
    finder = Finder(method(**settings).config, None)
    for start, stop in ((0, 257), (0, 9), (40, 101), (256, 257)):
        flags = finder.find(c, start, stop, None)
        most = finder.most(stop - start)
        assert int(flags.sum(1).max()) <= most
        got = boundaries.to_list(flags, start)
        for row, listed in zip(flags, got, strict=True):
            at = (row.nonzero()[:, 0] + start).tolist()
            assert listed.tolist() == at + [stop] * (got.shape[1] - len(at))
