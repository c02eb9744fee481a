"""Several processes training one set of routers, as `accelerate launch` starts them."""

from collections.abc import Sequence

import torch
from torch import distributed, nn

from ...launch import launched, meet


class Processes:
    """This process and its fellows; alone it does nothing. Gradients are added up on the CPU, over gloo."""

    def __init__(self) -> None:
        found = launched()
        self.rank, self.count = found.rank, found.world
        if self.count > 1:
            meet()

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this process's."""
        return range(self.rank, count, self.count)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of all gradients; a parameter without one counts as zero."""
        if self.count == 1:
            return
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).float().cpu().flatten() for p in parameters]
        )
        distributed.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p).to(p)
