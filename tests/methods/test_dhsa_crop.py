"""DHSA's chunk table after the cache was cut back: as if the tokens taken back had never been."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfpatch.methods.dhsa.table import ChunkTable

PROMPT, MORE, LENGTH = 20, 33, 41  # tokens of the prompt, tokens when chunks were closed again, all


def every_fourth(start: int, stop: int) -> Tensor:
    """Boundaries at the region's first token and every fourth after it."""
    return (torch.arange(stop - start) % 4 == 0).expand(2, -1)


@pytest.mark.parametrize("length", [PROMPT, 21, 29, MORE - 1, MORE, MORE + 1, LENGTH])
def test_chunks_closed_with_tokens_taken_back_are_open_again(length: int) -> None:
    k = torch.randn(2, 3, LENGTH, 8)

    def read(table: ChunkTable, stop: int, closed: bool) -> None:
        if closed:
            table.close(29, every_fourth, MORE)  # cut up to 29 when there were 33 tokens
        table.grow(table.closed, stop)
        table.chunks(k[:, :, :stop])

    cut, never = (ChunkTable.empty(k) for _ in range(2))
    for table in (cut, never):
        table.close(PROMPT, every_fourth)
    read(cut, LENGTH, closed=True)
    cut.crop(length)
    read(never, length, closed=length >= MORE)
    cut.chunks(k[:, :, :length]), never.chunks(k[:, :, :length])
    assert cut.closed == never.closed and cut.seen == never.seen
    assert torch.equal(cut.spans[0], never.spans[0]) and torch.equal(cut.spans[1], never.spans[1])
    torch.testing.assert_close(cut.moments, never.moments)
