"""Prompts as tokens, in batches of one length; what many of them begin with is run once for all."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

SHORTEST = 16
CACHE_WORDS = ("cache", "past_key_values")  # as the releases have it


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts with the same beginning `prefix [P]`, which may be empty: rows `[n]` and the ids `[n, L]` after it."""

    prefix: Tensor
    batches: list[tuple[Tensor, Tensor]]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.prefix) + max(ids.shape[1] for _, ids in self.batches)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return len(self.prefix) + min(ids.shape[1] for _, ids in self.batches)


def grouped(ids: Sequence[list[int]], batch: int, share: bool = False) -> list[Group]:
    """Prompts in batches of at most `batch`; `share`: those alike in SHORTEST tokens share a prefix."""
    together: dict[tuple[int, ...], list[int]] = {}
    for n, row in enumerate(ids):
        together.setdefault(tuple(row[:SHORTEST]) if share else (), []).append(n)
    groups = []
    for start, rows in together.items():
        common = _common([ids[n] for n in rows]) if len(start) == SHORTEST and len(rows) > 1 else 0
        by_length: dict[int, list[int]] = {}
        for n in rows:
            by_length.setdefault(len(ids[n]), []).append(n)
        chunks = [some[a : a + batch] for some in by_length.values() for a in range(0, len(some), batch)]
        batches = [(torch.tensor(some), torch.tensor([ids[n][common:] for n in some])) for some in chunks]
        groups.append(Group(torch.tensor(ids[rows[0]][:common], dtype=torch.long), batches))
    return groups


def _common(ids: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with, less one where a prompt would have none of its own."""
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*ids, strict=False)))
    return min(same, min(map(len, ids)) - 1)


def last_logits(model: Any, group: Group) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows `[n]` and the float32 logits `[n, V]` after their prompts, batch by batch."""
    device = next(model.parameters()).device
    prefix = group.prefix.to(device)[None]
    word = next((w for w in CACHE_WORDS if w in inspect.signature(model.forward).parameters), "")
    cache = _prefilled(model, prefix, word) if word and prefix.shape[1] else None
    for rows, ids in group.batches:
        ids = ids.to(device)
        if cache is None:
            out = model(torch.cat([prefix.expand(len(ids), -1), ids], 1), use_cache=False, logits_to_keep=1)
        else:
            own = copy.deepcopy(cache)
            own.reorder_cache(torch.zeros(len(ids), dtype=torch.long, device=device))
            out = model(ids, **{word: own}, use_cache=True, logits_to_keep=1)
        yield rows, out.logits[:, -1].float().cpu()


def _prefilled(model: Any, prefix: Tensor, word: str) -> Any:
    """The cache of `prefix [1, P]`, or None where the model keeps anything else than keys and values, or nothing."""
    cache = getattr(model(prefix, use_cache=True, logits_to_keep=1), word, None)
    layers = getattr(cache, "layers", None)
    plain = layers and all(hasattr(layer, "keys") and not hasattr(layer, "conv_states") for layer in layers)
    return cache if plain else None
