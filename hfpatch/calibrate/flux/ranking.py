"""Training-free rankings of layers for `flux`: which need full attention most."""

from collections.abc import Sequence
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
        self.total, self.calls = torch.zeros(layers), torch.zeros(layers)
        self.answer = 0  # its first token

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        if self.by != "entropy":
            score = self._missed(call, out)
        elif call.hidden is None:
            return
        else:
            score = torch.stack([matrix_entropy(row) for row in call.hidden]).mean()
        self.total[call.layer] += score.cpu()
        self.calls[call.layer] += 1

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


@torch.no_grad()
def rank_layers(model: Any, examples: Sequence[Example], config: FluxConfig, by: str = "error") -> Tensor:
    """Scores `[layers]`, highest for layers to keep full, while the model runs densely on the examples.

    By "error": of the sparse branch's output. "answer": that at the queries from which the answers of retrieval
    examples are told, head by head. "audit": the attention mass that its keys miss, at a few queries. "entropy": of
    the hidden states, the paper's appendix C; the others are ours. Raises ConfigError.
    """
    chosen = [e for e in examples if e.kind == "retrieval"] if by == "answer" else examples
    if by == "answer" and not chosen:
        raise ConfigError("--router answer needs examples of the kind 'retrieval'; the data has none.")
    probe = _Probe(config, by, model.config.get_text_config().num_hidden_layers)
    with patched_with(model, [probe]):
        for example in chosen:
            probe.answer = example.predict_from
            model(input_ids=example.ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    return probe.total / probe.calls.clamp_min(1)
