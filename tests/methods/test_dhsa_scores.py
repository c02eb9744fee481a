"""DHSA's scores of chunks: mass, rotary bands, and their independence of length and position."""

import pytest
import torch
from torch import Tensor

from hfpatch.methods.dhsa import boundaries
from hfpatch.methods.dhsa.rotary import Rotary
from hfpatch.methods.dhsa.score import score_chunks
from hfpatch.methods.dhsa.table import ChunkTable


def test_mass_finds_one_strong_key_that_a_mean_hides() -> None:
    """One key of sixteen stands out; its chunk's mean hardly moves, the variance of its keys does."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 160, 16, generator=g)
    k[:, :, 40] = 6.0
    table = ChunkTable.empty(k)
    table.close(k.shape[2], lambda start, stop: boundaries.fixed(1, 0, 160, 16, k.device))
    q, upto = torch.ones(1, 2, 1, 16), torch.tensor([160])
    chunks = table.chunks(k)
    mass = score_chunks(q, chunks, "mass", upto, 0.25)
    assert int(mass.argmax()) == 2 and bool(mass.isfinite().all())


@pytest.mark.parametrize("rotary", [Rotary(), Rotary(share=0.5), Rotary(tail=6), Rotary(interleaved=True)], ids=str)
def test_mass_does_not_depend_on_where_positions_begin(rotary: Rotary) -> None:
    """Turning queries and keys by the same angles, as left padding does, changes no score."""
    k, q, upto = torch.randn(1, 2, 96, 16), torch.randn(1, 4, 3, 16), torch.tensor([32, 64, 96])
    turned = 6 if rotary.tail else int(16 * rotary.share)
    start, half = (10 if rotary.tail else 0), turned // 2
    angle = torch.rand(half) * 6

    one, other = slice(start, start + half), slice(start + half, start + turned)
    if rotary.interleaved:
        one, other = slice(start, start + turned, 2), slice(start + 1, start + turned, 2)

    def turn(x: Tensor) -> Tensor:
        a, b, x = x[..., one], x[..., other], x.clone()
        x[..., one] = a * angle.cos() - b * angle.sin()
        x[..., other] = a * angle.sin() + b * angle.cos()
        return x

    def scores(q: Tensor, k: Tensor) -> Tensor:
        table = ChunkTable.empty(k, rotary)
        table.close(k.shape[2], lambda start, stop: boundaries.fixed(1, 0, 96, 8, k.device))
        return score_chunks(q, table.chunks(k), "mass", upto, 0.25)

    torch.testing.assert_close(scores(turn(q), turn(k)), scores(q, k), rtol=1e-4, atol=1e-4)


def test_rotary_bands_rank_what_one_band_sees() -> None:
    """A chunk that only the slow channels favour wins although the fast ones, washed out, add noise."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 80, 32, generator=g) * 0.1
    slow = [*range(12, 16), *range(28, 32)]
    k[:, :, 24:32, slow] += 1
    table = ChunkTable.empty(k)
    table.close(k.shape[2], lambda start, stop: boundaries.fixed(1, 0, 80, 8, k.device))
    q = torch.zeros(1, 1, 1, 32)
    q[..., slow] = 1
    score = score_chunks(q, table.chunks(k), "bands", torch.tensor([80]), 0.25)
    assert int(score.argmax()) == 3
    early = score_chunks(q, table.chunks(k), "bands", torch.tensor([30]), 0.25)
    assert (early[..., 3:] == 0).all()


def test_representation_is_unbiased_under_length() -> None:
    """The noise of a score must not depend on the chunk's length; the mean's own shrinks, the sum's own grows."""
    k = torch.randn(64, 1, 1040, 16)
    table = ChunkTable.empty(k)
    flags = torch.zeros(64, 1040, dtype=torch.bool)
    lengths = [4] * 32 + [16] * 32 + [25, 375]
    flags[:, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    table.close(k.shape[2], lambda start, stop: flags)
    noise = table.chunks(k).represent(16, False)[:, 0, :-1].square().mean((0, 2)).sqrt()
    assert abs(float(noise[:32].mean()) - 1) < 0.05 and abs(float(noise[32:64].mean()) - 1) < 0.05
    assert abs(float(noise[-1]) - 1) < 0.1
