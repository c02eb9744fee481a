"""Training-free rankings of layers for `flux`: which need full attention most."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...api import patched_with
from ...core.audit import Audit
from ...core.call import AttentionCall
from ...core.method import Method
from ...errors import ConfigError
from ...methods.flux.method import Flux, FluxConfig
from ...ops import attend
from ..unfinished import Unfinished, data_mark, model_mark
from .examples import Example


def matrix_entropy(hidden: Tensor, top: int = 64) -> Tensor:
    """Von Neumann entropy, in nats, of the trace-normalised covariance of `hidden [L, d]` over its top eigenvalues."""
    x = hidden.float() - hidden.float().mean(0)
    values = torch.linalg.svdvals(x).square()[:top]
    p = values / values.sum().clamp_min(1e-12)
    return -(p * p.clamp_min(1e-12).log()).sum()


class _Probe(Method):
    """Scores each layer while the model runs densely."""

    def __init__(self, config: FluxConfig, by: str, layers: int) -> None:
        super().__init__(config)
        self.child, self.by, self.audit = Flux(config).child, by, Audit(tiles=0)
        self.seen = torch.zeros(2, layers)  # sums of scores, and how many
        self.answer = 0  # its first token

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        if self.by != "entropy":
            score = self._missed(call, out)
        elif call.hidden is None:
            return
        else:
            score = torch.stack([matrix_entropy(row) for row in call.hidden]).mean()
        self.seen[:, call.layer] += torch.stack([score.float().cpu(), torch.ones(())])

    def _missed(self, call: AttentionCall, out: Tensor) -> Tensor:
        """What the sparse branch would miss here: attention mass, or output by its error, whole or for the answer."""
        selection = self.child.select(call)
        if selection is None:
            return torch.zeros(())
        sparse = attend(
            call.q, call.k, call.v, selection=selection, scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            bias=call.bias,
        )  # fmt: skip
        if self.by == "audit":
            return 1 - self.audit.sample(call, selection, sparse.out, sparse.lse).mass.mean()
        got, want = sparse.out.float(), out.float()
        if self.by == "answer":
            rows = slice(self.answer - 1, call.Lq - 1)  # [B, R, Hq, Dv]: what the answer's tokens are told from
            return ((got - want)[:, rows].norm(dim=-1) / want[:, rows].norm(dim=-1)).mean()
        return (got - want).norm() / want.norm()


def telling(examples: Sequence[Example], by: str) -> Sequence[Example]:
    """The examples that such a ranking looks at. Raises ConfigError when there is none."""
    chosen = [e for e in examples if e.kind == "retrieval"] if by == "answer" else examples
    if not chosen:
        raise ConfigError("--router answer needs examples of the kind 'retrieval'; the data has none.")
    return chosen


@torch.no_grad()
def rank_layers(
    model: Any,
    examples: Sequence[Example],
    config: FluxConfig,
    by: str = "error",
    *,
    out: Path | None = None,
    resume: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Scores `[layers]`, highest for layers to keep full, while the model runs densely on the examples.

    By "error": of the sparse branch's output. "answer": that at the queries from which the answers of retrieval
    examples are told, head by head. "audit": the attention mass that its keys miss, at a few queries. "entropy": of
    the hidden states, the paper's appendix C; the others are ours. In the folder `out` an interrupted ranking leaves
    its sums, and goes on from there when `resume`. Raises ConfigError.
    """
    chosen = telling(examples, by)
    probe = _Probe(config, by, model.config.get_text_config().num_hidden_layers)
    run = {"calibration": "flux", "ranking": by, "sparse": config.to_dict()}
    marks = {"model": model_mark(model), "examples": data_mark([e.ids for e in chosen])}
    kept = Unfinished(out, {**run, **marks}, "texts", len(chosen))
    sums = torch.zeros_like(probe.seen)
    if resume and (found := kept.load()):
        with kept.fitting():
            sums.copy_(found[1]["sums"])
    for _ in range(kept.done):
        advance()
    with patched_with(model, [probe]), kept.keeping(lambda: ({}, {"sums": sums})):
        for example in chosen[kept.done :]:
            probe.seen.zero_()
            probe.answer = example.predict_from
            model(input_ids=example.ids[None].to(model.device), use_cache=False, logits_to_keep=1)
            with kept.step():
                sums += probe.seen
            advance()
        kept.save()
    return sums[0] / sums[1].clamp_min(1)
