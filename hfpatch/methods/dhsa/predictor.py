"""The boundary predictor: one small network for all layers that reads the keys around a position."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.learned import Learned, check_tensors
from ...errors import ConfigError

PREFIX = "predictor."
EMBEDDED = Path(__file__).parent / "embedded"
POSITIONS = 2048
MOST = 1 << 16


class BoundaryPredictor(nn.Module):
    """Logit of a boundary before every token, from the w keys on each side of it.

    The 2w keys (all KV heads side by side, `channels` = Hkv * D) go through one self-attention and a layer norm,
    each side is averaged to l and r, and `[l, r, |l - r|, l * r, cos(l, r)]` through one hidden layer.
    The paper's code attends in all `channels`, which for a model of 1024 costs as much as a quarter of dense
    attention at 32k; with `width` keys are first projected to that many (None: as in that code). The number of heads
    is saved with the weights, which do not show it. Keys before the first token are zeros there; here such
    positions have no logit.
    """

    sizes: Tensor

    def __init__(
        self,
        channels: int,
        *,
        window: int = 4,
        width: int | None = 64,
        heads: int = 4,
        hidden: int = 256,
        device: str | None = None,
    ) -> None:
        super().__init__()
        inner = width or channels
        if inner % heads:
            raise ConfigError(f"A boundary predictor of width {inner} cannot have {heads} heads.")
        self.channels, self.window, self.width, self.heads = channels, window, width, heads
        linear = partial(nn.Linear, device=device)
        self.reduce = linear(channels, inner, bias=False) if width else None
        self.qkv = linear(inner, 3 * inner)
        self.out = linear(inner, inner)
        self.norm = nn.LayerNorm(inner, device=device)
        self.mlp = nn.Sequential(linear(4 * inner + 1, hidden), nn.ReLU(), linear(hidden, 1))
        self.register_buffer("sizes", torch.tensor([channels, window, width or 0, heads, hidden]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., L - 2w + 1]` of keys `x [..., L, channels]`; entry n is a boundary before token n + w."""
        w = self.window
        count = x.shape[-2] - 2 * w + 1
        if count < 1:
            return x.new_zeros(*x.shape[:-2], 0)
        x = self.qkv(x if self.reduce is None else self.reduce(x))
        return torch.cat(
            [self._some(x[..., n : n + POSITIONS + 2 * w - 1, :]) for n in range(0, count, POSITIONS)], -1
        )

    def _some(self, qkv: Tensor) -> Tensor:
        w = self.window
        tokens = qkv.unfold(-2, 2 * w, 1).transpose(-1, -2)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in tokens.chunk(3, -1))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        seen = self.norm(self.out((weights @ v).transpose(-2, -3).flatten(-2)))
        left, right = seen[..., :w, :].mean(-2), seen[..., w:, :].mean(-2)
        cosine = F.cosine_similarity(left, right, dim=-1)[..., None]
        return self.mlp(torch.cat([left, right, (left - right).abs(), left * right, cosine], -1))[..., 0]

    def score(self, k: Tensor) -> Tensor:
        """Logits `[B, L]` of keys `k [B, Hkv, L, D]`, -inf where a side has fewer than w tokens."""
        channels = k.shape[1] * k.shape[3]
        if channels != self.channels:
            raise ConfigError(_mismatch(self.channels, k.shape[1], k.shape[3]))
        weight = next(self.parameters())
        if weight.device != k.device:
            self.to(k.device)
        if k.shape[2] < 2 * self.window:
            return k.new_full((k.shape[0], k.shape[2]), -torch.inf, dtype=torch.float32)
        logits = self(k.transpose(1, 2).flatten(2).to(weight.dtype)).float()
        return F.pad(logits, (self.window, k.shape[2] - self.window - logits.shape[1]), value=-torch.inf)

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError when the model's config states another KV width."""
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(text, "num_key_value_heads", None) or 0
        size = getattr(text, "head_dim", None) or 0
        known = heads * size > 0 and getattr(text, "kv_lora_rank", None) is None
        if known and heads * size != self.channels:
            raise ConfigError(_mismatch(self.channels, heads, size))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and sizes, for a safetensors file."""
        return {PREFIX + name: t for name, t in self.state_dict().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "BoundaryPredictor | None":
        """The predictor saved in `tensors`, which are as `learned` tells; None if there is none."""
        own = {name.removeprefix(PREFIX): t for name, t in tensors.items()}
        if not own:
            return None
        made = cls._empty(own["sizes"])
        made.load_state_dict(
            {k: t.float() if t.is_floating_point() else t.long() for k, t in own.items()}, assign=True
        )
        return made.eval().requires_grad_(False)

    @classmethod
    def _empty(cls, sizes: Tensor) -> "BoundaryPredictor":
        """One of these sizes, without memory for its weights."""
        channels, window, width, heads, hidden = sizes.tolist()
        return cls(channels, window=window, width=width or None, heads=heads, hidden=hidden, device="meta")

    @classmethod
    def learned(cls, tensors: Mapping[str, Tensor]) -> dict[str, Learned]:
        """What the tensors of a predictor must be, by the sizes among them. Raises ConfigError."""
        sizes, name = Learned((5,), whole=True, ge=0, le=MOST), PREFIX + "sizes"
        check_tensors("dhsa", {name: tensors[name]} if name in tensors else {}, {name: sizes}, torch.float32)
        if name not in tensors:
            return {name: sizes}
        channels, window, width, heads, hidden = tensors[name].tolist()
        if not (channels and window and heads and hidden) or (width or channels) % heads:
            raise ConfigError(
                f"dhsa: the tensor {name} holds {tensors[name].tolist()}; it takes channels, window, width (0: none), "
                "heads, which divide the width, and hidden."
            )
        shapes = {PREFIX + n: tuple(t.shape) for n, t in cls._empty(tensors[name]).named_parameters()}
        return {name: sizes, **{n: Learned(s, along=(name, *shapes)) for n, s in shapes.items()}}


def _mismatch(channels: int, heads: int, size: int) -> str:
    return (
        f"dhsa: the boundary predictor reads {channels} key channels, this model has {heads * size} "
        f"({heads} KV heads of {size}); train one for it with `hfpatch calibrate dhsa`."
    )


def load_predictor(name_or_path: str | Path) -> BoundaryPredictor:
    """The predictor in a patch folder or Hub repository, or the "embedded" model's own. Raises ConfigError."""
    from ...config.patch_config import PatchConfig

    if name_or_path == "embedded":
        name_or_path = EMBEDDED
    for own in PatchConfig.from_pretrained(name_or_path).tensors_by_method():
        if PREFIX + "sizes" in own:
            own = {name: t for name, t in own.items() if name.startswith(PREFIX)}
            check_tensors(f"dhsa: {name_or_path}", own, BoundaryPredictor.learned(own), torch.float32)
            if (predictor := BoundaryPredictor.of(own)) is not None:
                return predictor
    raise ConfigError(f"{name_or_path} holds no boundary predictor; make one with `hfpatch calibrate dhsa`.")
