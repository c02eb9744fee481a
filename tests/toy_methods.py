"""Methods that do one thing each, registered while a test runs, and the inputs and formulas their tests share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from test_invariants import built
from torch import Tensor

from hfpatch import Method, MethodConfig
from hfpatch.config import registry
from hfpatch.core.call import AttentionCall
from hfpatch.core.reweight import Columns
from hfpatch.core.selection import BlockMap, Causal, Selection

LENGTH = 41
LENGTHS = [LENGTH, 26, 12]


@dataclass(kw_only=True)
class ToyConfig(MethodConfig):
    """One number a toy may use."""

    factor: float = 2.0


class Toy(Method):
    """Base of the toys; each has its own config class, made by `toy`."""

    config: ToyConfig

    @property
    def factor(self) -> float:
        return self.config.factor


class KeepAll(Toy):
    def select(self, call: AttentionCall) -> Selection:
        return Causal()


class RandomBlocks(Toy):
    """Random key blocks per head and query block, its own block always included."""

    block_q, block_k = 8, 8

    def select(self, call: AttentionCall) -> Selection:
        n_q, n_k = -(-call.Lq // self.block_q), -(-call.Lk // self.block_k)
        seed = torch.Generator().manual_seed(call.Lk * 131 + call.layer)
        score = torch.rand(1, call.Hkv, n_q, n_k, generator=seed)
        last = (torch.arange(1, n_q + 1) * self.block_q).clamp(max=call.Lq) + call.off - 1
        first = torch.arange(n_q) * self.block_q + call.off
        blocks = torch.arange(n_k)
        near = (blocks >= (first // self.block_k)[:, None]) & (blocks <= (last // self.block_k)[:, None])
        score = score.masked_fill(near, 2.0).masked_fill(blocks > (last // self.block_k)[:, None], -1.0)
        counts = (near.sum(-1) + 1).clamp(max=n_k).expand(1, call.Hkv, -1)
        counts = torch.minimum(counts, (score >= 0).sum(-1))
        return BlockMap(score.argsort(-1, descending=True), counts, self.block_q, self.block_k)


class RandomTokens(RandomBlocks):
    block_q, block_k = 1, 1


class NoFirstKey(Toy):
    """A bias on the first key, different for each head."""

    def bias(self, call: AttentionCall) -> Tensor:
        out = torch.zeros(1, call.Hq, call.Lk)
        out[..., 0] = self.factor * torch.arange(1, call.Hq + 1)
        return out


class FirstKey(Toy):
    """Multiplies the weight of the first key by `factor`."""

    def reweight(self, call: AttentionCall) -> list[Columns]:
        return [Columns(torch.tensor([0]), self.factor)]


class ScaleHeads(Toy):
    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        return out * torch.linspace(0.5, self.factor, call.Hq)[:, None]


class Recorder(Toy):
    """Keeps what it saw."""

    def __init__(self, config: ToyConfig, tensors: Any = None) -> None:
        super().__init__(config, tensors)
        self.seen: list[tuple[AttentionCall, Tensor, Tensor | None]] = []

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        self.seen.append((call, out, lse))


class LseRecorder(Recorder):
    needs = frozenset({"lse"})


class Router(Toy):
    """By the parity of the row's first query norm: streaming or dense; the decision of prefill is kept."""

    stateful = True
    choose: ClassVar[Callable[[int], str | None]]

    def __init__(self, config: ToyConfig, tensors: Any = None) -> None:
        super().__init__(config, tensors)
        streaming = registry.get_method("streaming")
        make = registry.make_config
        self.children = {
            "narrow": streaming(make("streaming", {"sink": 1, "window": 4})),
            "wide": streaming(make("streaming", {"sink": 2, "window": 12})),
        }
        self.decided = 0

    def route(self, call: AttentionCall) -> list[Method | None]:
        if "choice" not in call.state:
            self.decided += 1
            values = call.hidden[:, 0].double().abs().sum(-1)
            order = (values * 1000).long() % 3
            call.state["choice"] = [(None, "narrow", "wide")[n] for n in order.tolist()]
        return [self.children.get(c) for c in call.state["choice"]]


class DenseRouter(Toy):
    def route(self, call: AttentionCall) -> list[Method | None]:
        return [None] * call.B


TOYS = [
    KeepAll, RandomBlocks, RandomTokens, NoFirstKey, FirstKey, ScaleHeads, Recorder, LseRecorder, Router, DenseRouter
]  # fmt: skip


def named(cls: type[Toy]) -> type[Toy]:
    name = f"toy-{cls.__name__}"
    cls.config_class = dataclass(kw_only=True)(type(f"{cls.__name__}Config", (ToyConfig,), {"method": name}))
    return cls


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for cls in map(named, TOYS):
        monkeypatch.setitem(registry._registered, cls.config_class.method, cls)
    yield


def make(cls: type[Toy], **settings: Any) -> MethodConfig:
    return cls.config_class(**settings)


full_models = [t for t in zoo.SUPPORTED.values() if not t.all_sliding]
architectures = pytest.mark.parametrize("tiny", full_models, ids=lambda t: t.name)
some = pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
executors = pytest.mark.parametrize("executor", ["torch", "reference"])


def padded(tiny: zoo.TinyModel, side: str = "left") -> tuple[Tensor, dict[str, Tensor]]:
    model = built(tiny.name)
    batch, mask = (zoo.left_pad if side == "left" else zoo.right_pad)(zoo.prompt(model, 3, LENGTH), LENGTHS)
    extra = {"position_ids": zoo.positions(mask)} if tiny.learned_positions else {}
    return batch, {"attention_mask": mask, **extra}


def softmax_of(call: AttentionCall, selection: Selection | None = None) -> Tensor:
    """Weights `[B, Hq, Lq, Lk]` written out by hand."""
    k = call.k.float().repeat_interleave(call.groups, 1)
    scores = call.scale * call.q.float() @ k.mT
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    keep = (selection or Causal()).mask(call.layout)
    scores = scores.masked_fill(~keep, -torch.inf)
    if call.sinks is not None:
        extra = call.sinks.detach().float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def values_of(call: AttentionCall, weights: Tensor) -> Tensor:
    """Head outputs `[B, Lq, Hq, Dv]` for given weights."""
    return (weights @ call.v.float().repeat_interleave(call.groups, 1)).transpose(1, 2)
