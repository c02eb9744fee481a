"""Which layer looks from a question to its answer: needles of known place, one forward per needle."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...api import patched_with
from ...core.call import AttentionCall
from ...core.method import Method
from ...errors import InputError
from .prompt import left_padded, make_prompt, tokenize
from .scores import QuestionView, question_view


class _Watch(Method):
    """Looks from the last `asked` tokens in every full-attention layer."""

    acts_in = frozenset({"prefill"})

    def __init__(self, config: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.asked = 0
        self.views: dict[int, QuestionView] = {}

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        self.views[call.layer] = question_view(call, 0, self.asked)


@torch.no_grad()
def rank_layers(
    model: nn.Module, tokenizer: Any, settings: Any, question: str, probes: int, seed: int
) -> list[tuple[int, float]]:
    """Full-attention layers with the mean of 1 / (place of the needle's sentence among all), best first.

    Each probe is a chunk of `settings.chunk_tokens` tokens of made-up sentences with one needle, or of as many as the
    model's positions leave room for; `question` has {key}.
    """
    from ...text import grammar

    if tokenizer is None or not callable(tokenizer):
        raise InputError("Pass the model's tokenizer: rank_layers(tokenizer=tokenizer).")
    if "{key}" not in question or probes < 1:
        raise InputError("rank_layers needs a question with {key} in it and at least one probe.")
    watch = _Watch(replace(settings, layers=None))
    config: Any = model.config
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = settings.chunk_tokens if window is None else min(settings.chunk_tokens, window * 3 // 4)
    reciprocals: dict[int, list[float]] = {}
    with patched_with(model, [watch]):
        for n in range(probes):
            rng = random.Random(f"probe-{seed}-{n}")
            key = grammar.random_key(rng)
            prompt = make_prompt(tokenizer, settings.template, question.replace("{key}", key), settings.chat)
            said, source, size = list[list[int]](), grammar.grammar_sentences(rng), 0
            while size < length:
                said.append(tokenize(tokenizer, next(source) + " "))
                size += len(said[-1])
            place = rng.randrange(len(said))
            said[place] = tokenize(tokenizer, grammar.needle(key, grammar.random_value(rng)) + " ")
            watch.asked, watch.views = len(prompt.tail), {}
            batch = left_padded([prompt.ids([t for ids in said for t in ids])], 0, getattr(model, "device", None))
            model(**batch, use_cache=False, logits_to_keep=1)
            for layer, view in watch.views.items():
                reciprocals.setdefault(layer, []).append(_reciprocal(view, len(prompt.head), said, place, settings))
    ranked = [(layer, sum(places) / probes) for layer, places in reciprocals.items()]
    return sorted(ranked, key=lambda pair: (-pair[1], pair[0]))


def _reciprocal(view: QuestionView, start: int, said: list[list[int]], place: int, settings: Any) -> float:
    owner = torch.tensor([n for n, ids in enumerate(said) for _ in ids], device=view.weights.device)
    weights = view.question_weights() if settings.question_weights else None
    scores = view.token_scores(start, start + len(owner), settings.phrase, weights)
    best = torch.zeros(len(said), device=scores.device).scatter_reduce_(0, owner, scores, "amax")
    return 1.0 / (1 + int((best > best[place]).sum()))
