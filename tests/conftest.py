"""Seeds every test and fills uninitialised memory with NaN, so that a buffer nobody wrote is seen."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported; without a GPU nothing else uses it


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(42)
    torch.set_num_threads(1)
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poisoned(make):
        def build(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

        return build

    torch.empty, torch.Tensor.new_empty, torch.empty_like = map(poisoned, (empty, new_empty, empty_like))
    yield
    torch.empty, torch.Tensor.new_empty, torch.empty_like = empty, new_empty, empty_like
