"""Training-free rankings of layers for `flux`: which need full attention most."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...api import patched_with
from ...core.call import AttentionCall
from ...core.method import Method
from ...methods.flux.method import Flux, FluxConfig
from ...ops import attend
from ..unfinished import Unfinished, data_mark, model_mark


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
        self.child, self.by = Flux(config).child, by
        self.seen = torch.zeros(2, layers)  # sums of scores, and how many

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        if self.by == "entropy":
            if call.hidden is None:
                return
            score = torch.stack([matrix_entropy(row) for row in call.hidden]).mean()
        else:
            selection = self.child.select(call)
            sparse = attend(
                call.q, call.k, call.v, selection=selection, scale=call.scale, softcap=call.softcap, sinks=call.sinks
            ).out
            score = (sparse.float() - out.float()).norm() / out.float().norm()
        self.seen[:, call.layer] += torch.stack([score.float().cpu(), torch.ones(())])


@torch.no_grad()
def rank_layers(
    model: Any,
    texts: Sequence[Tensor],
    config: FluxConfig,
    by: str = "error",
    *,
    out: Path | None = None,
    resume: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Scores `[layers]`, highest for layers to keep full: output error of the sparse branch, or matrix entropy.

    `texts` are token ids `[L]`. Entropy is the paper's appendix C; the output error is ours. In the folder `out` an
    interrupted ranking leaves its sums, and goes on from there when `resume`. Raises ConfigError.
    """
    probe = _Probe(config, by, model.config.get_text_config().num_hidden_layers)
    run = {"calibration": "flux", "ranking": by, "sparse": config.to_dict()}
    marks = {"model": model_mark(model), "examples": data_mark(texts)}
    kept = Unfinished(out, {**run, **marks}, "texts", len(texts))
    sums = torch.zeros_like(probe.seen)
    if resume and (found := kept.load()):
        with kept.fitting():
            sums.copy_(found[1]["sums"])
    for _ in range(kept.done):
        advance()
    with patched_with(model, [probe]), kept.keeping(lambda: ({}, {"sums": sums})):
        for ids in texts[kept.done :]:
            probe.seen.zero_()
            model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
            with kept.step():
                sums += probe.seen
            advance()
        kept.save()
    return sums[0] / sums[1].clamp_min(1)
