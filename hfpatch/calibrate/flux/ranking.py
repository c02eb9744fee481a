"""Training-free rankings of layers for `flux`: which need full attention most."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...api import patched_with
from ...core.audit import Audit
from ...core.call import AttentionCall
from ...core.method import Method
from ...methods.flux.method import Flux, FluxConfig
from ...ops import attend


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
        """What the sparse branch would miss here: attention mass, or output by its error."""
        selection = self.child.select(call)
        if selection is None:
            return torch.zeros(())
        sparse = attend(
            call.q, call.k, call.v, selection=selection, scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            bias=call.bias,
        )  # fmt: skip
        if self.by == "audit":
            return 1 - self.audit.sample(call, selection, sparse.out, sparse.lse).mass.mean()
        return (sparse.out.float() - out.float()).norm() / out.float().norm()


@torch.no_grad()
def rank_layers(model: Any, texts: Sequence[Tensor], config: FluxConfig, by: str = "error") -> Tensor:
    """Scores `[layers]`, highest for layers to keep full, while the model runs densely on `texts` of ids `[L]`.

    By "error": of the sparse branch's output. "audit": the attention mass that its keys miss, at a few queries.
    "entropy": of the hidden states, the paper's appendix C; the other two are ours.
    """
    probe = _Probe(config, by, model.config.get_text_config().num_hidden_layers)
    with patched_with(model, [probe]):
        for ids in texts:
            model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    return probe.total / probe.calls.clamp_min(1)
