"""No sparse call makes a tensor of `Lq * Lk` elements."""

import pytest
import torch
from helpers import inputs, layout_of, random_map
from largest import Largest

from hfpatch.core.selection import Both, Causal, Predicate, SinkWindow
from hfpatch.ops import attend

L = 1500


SELECTIONS = {
    "causal": lambda at: Causal(),
    "window": lambda at: SinkWindow(4, 60),
    "blocks": lambda at: random_map(at, at.Hkv, 32, 32, 4, even=True),
    "uneven": lambda at: random_map(at, at.Hkv, 32, 32, 4),
    "predicate": lambda at: Predicate(lambda h, i, j: (i + j) % 7 == 0),
    "both": lambda at: Both(SinkWindow(4, 60), random_map(at, 1, 32, 32, 4)),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_no_square_tensor(name):
    q, k, v = inputs(1, 2, 1, L, L, d=16)
    sel = SELECTIONS[name](layout_of(q, k))
    with torch.no_grad(), Largest() as seen:
        attend(q, k, v, selection=sel, scale=0.25, executor="torch")
    assert 0 < seen.elements < L * L / 4, f"{name}: {seen.elements} elements in one tensor"


@pytest.mark.parametrize("name", ["causal", "window", "blocks"])
def test_softcap_is_chunked(name):
    q, k, v = inputs(1, 1, 1, 6000, 6000, d=16)
    sel = SELECTIONS[name](layout_of(q, k))
    with torch.no_grad(), Largest() as seen:
        attend(q, k, v, selection=sel, scale=0.25, softcap=20.0, executor="torch")
    assert 0 < seen.elements < 6000 * 6000 / 4, f"{name}: {seen.elements} elements in one tensor"


def test_the_reference_is_seen():
    q, k, v = inputs(1, 2, 1, 300, 300, d=16)
    with torch.no_grad(), Largest() as seen:
        attend(q, k, v, selection=None, scale=0.25, executor="reference")
    assert seen.elements >= 2 * 300 * 300
