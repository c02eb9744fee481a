"""ACT: take attention away from sinks in the middle of the text and give it to the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.call import AttentionCall, rows_on
from ..core.method import Method
from ..core.reweight import Columns
from ..errors import ConfigError
from ..files.json_text import read_json
from ..runtime.model_facts import query_heads
from ..values import FLOAT_END, Misfit, OutOfRange, PathText, fitted, shown
from ._column_sums import ColumnSums


@dataclass(kw_only=True)
class ACTConfig(MethodConfig):
    """Settings of `act`."""

    method: ClassVar[str] = "act"
    beta: float = option(0.4, "what a sink keeps of its attention", ge=0, le=1)
    threshold: float | str = option("5/N", "mean attention that makes a token a sink: a share, or '5/N' for N keys")
    heads: list[list[int]] | PathText | None = option(
        None, "[layer, query head] pairs to calibrate, or a JSON file of them; all heads of `layers` when None"
    )

    def validate(self) -> None:
        if isinstance(self.heads, str):
            self.heads = _read_heads(Path(self.heads))
        if any(len(p) != 2 or min(p) < 0 for p in self.pairs):
            raise ConfigError("act: heads takes [layer, head] pairs, numbers from 0 on.")
        self.share(1)

    @property
    def pairs(self) -> list[list[int]]:
        """The chosen heads; none named when empty."""
        return self.heads if isinstance(self.heads, list) else []

    def share(self, keys: int) -> float:
        """The threshold for so many keys."""
        if isinstance(self.threshold, str):
            top, slash, n = self.threshold.replace(" ", "").partition("/")
            try:
                value = float(top)
            except ValueError:
                value = -1.0
            if slash and n == "N" and 0 < value <= FLOAT_END:
                return value / keys
        elif self.threshold > 0:
            return self.threshold
        raise ConfigError(
            f"act: threshold={shown(self.threshold)} is neither a number above 0 nor text such as '5/N'."
        )


def _read_heads(path: Path) -> list[list[int]]:
    try:
        data: Any = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"act: heads={shown(str(path))} is not a readable JSON file ({error}).") from error
    pairs = data.get("heads") if isinstance(data, dict) else data
    try:
        heads: list[list[int]] = fitted(pairs, list[list[int]])
    except (Misfit, OutOfRange):
        heads = [[]]
    if not all(len(p) == 2 for p in heads):
        raise ConfigError(f"act: {path} must hold a list of [layer, head] pairs, or one under 'heads'.")
    return heads


@register_method
class ACT(Method[ACTConfig]):
    """A'_ik = beta A_ik for sinks k, A_ik (1 + (1 - beta) m_i / (1 - m_i)) else, m_i the mass of row i on sinks.

    ACT, arXiv 2406.15765. A sink is a token other than the first whose column mean over all later queries exceeds
    the threshold (paper 5/N; its code 0.1). The means look at queries to come: over a prefill this is not causal,
    so log-likelihoods under it are none. Decoding keeps running means; the code uses the current row alone, lets
    mass leak back to sinks and fixes token 0 at weight 1, where we follow the paper. Sinks are chosen by dense
    weights even where another method narrows the keys. `act-paper` leaves out the first two layers and the last.
    """

    summary = "calibrated attention: less on sinks inside the text"
    paper = "https://arxiv.org/abs/2406.15765"
    reads = "positions"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"act-paper": {"layers": "2--2"}}
    stateful = True
    causality = "no"

    def __init__(self, config: ACTConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self._rollbacks = 0
        self._heads: dict[int, list[int]] = {}
        for layer, head in config.pairs:
            self._heads.setdefault(layer, []).append(head)

    def pick(self, layers: list[int]) -> list[int]:
        return [n for n in layers if n in self._heads] if self.config.heads else layers

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        missing = sorted(set(self._heads) - set(layers))
        if missing:
            raise ConfigError(f"act: heads of layer {missing[0]} are named, but that layer is not patched.")
        heads, worst = query_heads(model), max((h for hs in self._heads.values() for h in hs), default=0)
        if heads is not None and worst >= heads:
            raise ConfigError(f"act: there is no head {worst}; the model has {heads} query heads.")

    def notes(self) -> list[str]:
        notes = ["act: over a prefill, earlier tokens depend on later ones; do not read log-likelihoods from it"]
        if self.config.heads == []:
            notes.append("act: the head list is empty, which changes nothing")
        elif self.config.heads is None:
            notes.append(
                "act: no calibrated head list was given; every head is changed, which the paper advises against"
            )
        if self._rollbacks:
            notes.append(
                f"act: {self._rollbacks} times a layer's cache was rolled back; what the tokens taken back gave to "
                "earlier ones stays counted"
            )
        return notes

    def reweight(self, call: AttentionCall) -> list[Columns]:
        s = self.config
        heads = list(range(call.Hq)) if s.heads is None else self._heads.get(call.layer, [])
        if not heads or s.beta == 1:
            return []
        sink, device = self._sinks(call, heads), call.q.device
        keys: Tensor | slice = slice(0, call.Lk)
        if call.Lq > 1 or device.type == "cpu":  # which keys are sinks a GPU would be waited for, so a step takes all
            keys = sink.flatten(0, 1).any(0).nonzero()[:, 0]
            if not len(keys):
                return []
            sink = sink[..., keys]
        member = torch.zeros(call.B, call.Hq, 1, sink.shape[2], dtype=torch.bool, device=device)  # [B, Hq, 1, n]
        member[:, slice(None) if s.heads is None else rows_on(device, tuple(heads))] = sink[:, :, None]
        beta = s.beta

        def factor(weights: Tensor) -> Tensor:
            mass = (weights * member).sum(-1, keepdim=True).clamp(max=1.0)
            return torch.where(member, beta * (1 - mass) / (1 - beta * mass), 1.0)

        return [Columns(keys, factor)]

    @torch.no_grad()
    def _sinks(self, call: AttentionCall, heads: list[int]) -> Tensor:
        """Whether each key is a sink for each of the heads, bool `[B, H, Lk]`."""
        earlier = call.state.get("act")
        self._rollbacks += earlier is not None and earlier.cropped
        sums = ColumnSums.of(call, earlier, heads)
        call.state["act"] = sums
        sink = sums.means() > self.config.share(call.Lk)
        sink[..., 0] = False
        return sink
