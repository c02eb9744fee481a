"""The learned router of Flux: two ends of the prompt in, full or sparse out."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

FULL = 1
START_BIAS = 4.5


def pool_ends(queries: Tensor, size: int) -> Tensor:
    """Mean `[B, D]` over heads and over the first and last `size` tokens of `queries [B, L, Hq, D]`, in float32.

    Prompts shorter than `2 * size` count tokens of the middle twice, as the reference code does.
    """
    n = min(size, queries.shape[1])
    ends = torch.cat([queries[:, :n], queries[:, -n:]], dim=1)
    return ends.float().mean(dim=(1, 2))


class Router(nn.Module):
    """Two logits per row, [sparse, full], from pooled queries `[B, D]`; starts fully dense.

    Context encoder D -> 8D -> 2D and head 2D -> 4D -> D -> 2 with SiLU, as in the reference code. On device "meta" it
    has shapes and no weights.
    """

    def __init__(self, dim: int, device: str | None = None) -> None:
        super().__init__()
        linear = partial(nn.Linear, device=device)
        self.encoder = nn.Sequential(linear(dim, 8 * dim), nn.SiLU(), linear(8 * dim, 2 * dim))
        last = linear(dim, 2)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, START_BIAS]))
        self.head = nn.Sequential(linear(2 * dim, 4 * dim), nn.SiLU(), linear(4 * dim, dim), nn.SiLU(), last)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits `[B, 2]`."""
        logits: Tensor = self.head(self.encoder(pooled))
        return logits


class Routers(nn.Module):
    """One router per layer; on disk their tensors are named `layer.<n>.<parameter>`."""

    def __init__(self, layers: Sequence[int], dim: int, device: str | None = None) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({str(n): Router(dim, device) for n in layers})

    def __getitem__(self, layer: int) -> Router:
        router = self.layer[str(layer)]
        assert isinstance(router, Router)
        return router

    @property
    def layers(self) -> list[int]:
        """Layers that have a router."""
        return [int(n) for n in self.layer]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Routers":
        """Routers rebuilt from what `state_dict` gave, of the shapes that `router_shapes` tells."""
        layers = sorted({int(name.split(".")[1]) for name in tensors})
        routers = cls(layers, tensors[f"layer.{layers[0]}.encoder.0.weight"].shape[1], "meta")
        routers.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return routers.eval()


def router_shapes(dim: int | None) -> dict[str, tuple[int | None, ...]]:
    """The shapes of the parameters of a router that reads `dim` channels, by name; any when None."""
    shapes = {name: t.shape for name, t in Router(dim or 1, "meta").named_parameters()}
    return {name: (None,) * len(s) if dim is None else tuple(s) for name, s in shapes.items()}
