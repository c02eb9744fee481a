"""Gated attention: head outputs times a sigmoid of the token's own hidden state, before the output projection."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config.method_config import MethodConfig, option
from ...config.registry import register_method
from ...core.call import AttentionCall
from ...core.learned import Learned, ModelSizes
from ...core.method import Method
from ...errors import ConfigError, UnsupportedModelError
from ...runtime.after_attention import refuse_unless_free
from ...values import PathText, shown
from .research_gates import load_gated_model, load_gates

__all__ = ["Gated", "GatedConfig", "load_gated_model", "load_gates", "saved_gates"]

_KEY = re.compile(r"layers\.([0-9]{1,9})\.(weight|bias|constant)")


@dataclass(kw_only=True)
class GatedConfig(MethodConfig):
    """Settings of `gated`."""

    method: ClassVar[str] = "gated"
    form: str = option(
        "double",
        "the gate: 2 sigmoid(Wx), 1 at zero weights; sigmoid(Wx + b), the paper's; or a constant per head",
        choices=("double", "sigmoid", "constant"),
    )
    granularity: str = option(
        "headwise", "new gates: one per head, or one per channel of a head", choices=("headwise", "elementwise")
    )
    start_bias: float = option(
        5.0, "b of new sigmoid gates, whose W is zero; 4 gives a gate of .982, 5 of .993", ge=-1e4, le=1e4
    )
    weights: PathText | None = option(
        None, "folder or Hub id of saved gates; without any, gates start as the identity"
    )


@register_method
class Gated(Method[GatedConfig]):
    """out_h -> out_h g_h(x), x the attention module's input at the query's position.

    Gated attention, arXiv 2505.06708 (position G1), a training-time architecture: trained gates come from
    `load_gates`, `load_gated_model` or `hfpatch calibrate gated`. New gates are the identity: exactly for `double`
    and `constant`; a plain sigmoid of zero would halve every head. Learned tensors are
    `layers.N.weight [Hq or Hq Dv, d_model]`, `layers.N.bias`, or `layers.N.constant [Hq]`. Models with a gate of
    their own, and those that do more than reshape before the output projection, are refused. Sliding-window layers
    stay as they are.
    """

    summary = "query-dependent gates on head outputs"
    paper = "https://arxiv.org/abs/2505.06708"
    trained = True
    compiles = True

    def __init__(self, config: GatedConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        if not self.given and config.weights is not None:
            self.given = saved_gates(config.weights)
        self.gates: dict[int, dict[str, Tensor]] = {}
        for key, value in self.given.items():
            if match := _KEY.fullmatch(key):
                self.gates.setdefault(int(match[1]), {})[match[2]] = value
        self.loaded = bool(self.gates)
        self.watch: Callable[[AttentionCall], None] | None = None
        self._moved: dict[tuple[int, torch.device, torch.dtype], dict[str, Tensor]] = {}

    def learns(self, sizes: ModelSizes) -> dict[str, Learned]:
        heads, wide = sizes.heads, sizes.heads and sizes.value_dim and sizes.heads * sizes.value_dim
        if self.config.form == "constant":
            return {f"layers.{n}.constant": Learned((heads,)) for n in range(sizes.layers)}
        takes: dict[str, Learned] = {}
        for n in range(sizes.layers):
            weight = f"layers.{n}.weight"
            rows = self.given[weight].shape[:1] if weight in self.given else (None,)
            takes[weight] = Learned((heads, sizes.hidden), (wide, sizes.hidden))
            takes[f"layers.{n}.bias"] = Learned(tuple(rows), along=(weight,))
        return takes

    def pick(self, layers: list[int]) -> list[int]:
        return [n for n in layers if n in self.gates] if self.loaded else layers

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        refuse_unless_free(model, layers, self.name, native_gate_ok=False)
        missing = sorted(set(self.gates) - set(layers))
        if missing:
            raise ConfigError(f"gated: there are gates for layer {missing[0]}, but that layer is not patched.")

    def notes(self) -> list[str]:
        if self.loaded:
            return []
        start = f"sigmoid({self.config.start_bias:g})" if self.config.form == "sigmoid" else "1"
        return [f"gated: the gates are new, {start} everywhere; load or calibrate them"]

    def tensors(self) -> dict[str, Tensor]:
        return {f"layers.{n}.{name}": t for n, gate in sorted(self.gates.items()) for name, t in gate.items()}

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(call)
        gate = self._gate(call, out)
        if "constant" in gate:
            return out * gate["constant"][:, None]
        if call.hidden is None:
            raise UnsupportedModelError("gated: the attention module was called without hidden states.")
        score = F.linear(call.hidden, gate["weight"], gate.get("bias")).sigmoid_()
        if self.config.form == "double":
            score = score + score
        return out * score.view(*out.shape[:3], -1)

    def _gate(self, call: AttentionCall, out: Tensor) -> dict[str, Tensor]:
        """The layer's tensors on the call's device and in its dtype; made when there are none."""
        if call.layer not in self.gates:
            with torch.inference_mode(False):  # the gates may be trained later
                self.gates[call.layer] = self._new(call, out.shape[-1])
        gate = self.gates[call.layer]
        for t in gate.values():
            if t.requires_grad:
                return {name: t.to(out.device, out.dtype) for name, t in gate.items()}
        key = (call.layer, out.device, out.dtype)
        if key not in self._moved:
            with torch.inference_mode(False):
                self._moved[key] = {name: t.to(out.device, out.dtype) for name, t in gate.items()}
        return self._moved[key]

    def _new(self, call: AttentionCall, channels: int) -> dict[str, Tensor]:
        s, make = self.config, call.q.new_full
        if s.form == "constant":
            return {"constant": make((call.Hq,), 1.0, dtype=torch.float32)}
        if call.hidden is None:
            raise UnsupportedModelError("gated: the attention module was called without hidden states.")
        rows = call.Hq * (channels if s.granularity == "elementwise" else 1)
        gate = {"weight": make((rows, call.hidden.shape[-1]), 0.0, dtype=torch.float32)}
        return gate if s.form == "double" else {**gate, "bias": make((rows,), s.start_bias, dtype=torch.float32)}


def saved_gates(name_or_path: str) -> dict[str, Tensor]:
    """Gates in a saved patch config, a folder or Hub id. Raises ConfigError when it holds none."""
    from ...config.patch_config import PatchConfig

    saved = PatchConfig.from_pretrained(name_or_path)
    for config, own in zip(saved.methods, saved.tensors_by_method(), strict=True):
        if isinstance(config, GatedConfig) and own:
            return own
    raise ConfigError(f"gated: {shown(name_or_path)} holds no gate weights; save a patch with trained gates there.")
