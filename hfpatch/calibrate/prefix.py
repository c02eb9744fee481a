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
class Batch:
    """Prompts by number `rows [n]`, their ids after the prefix `[n, L]`, and where each has its last one, `ends [n]`.

    What follows an end is padding, which a causal model does not see before it.
    """

    rows: Tensor
    ids: Tensor
    ends: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts with the same beginning `prefix [P]`, which may be empty."""

    prefix: Tensor
    batches: list[Batch]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.prefix) + max(int(b.ends.max()) for b in self.batches) + 1

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return len(self.prefix) + min(int(b.ends.min()) for b in self.batches) + 1


def grouped(ids: Sequence[list[int]], batch: int, share: bool = False) -> list[Group]:
    """Prompts in batches of at most `batch`, each of one length.

    With `share`, those alike in SHORTEST tokens share a prefix, and a batch has several lengths.
    """
    together: dict[tuple[int, ...], list[int]] = {}
    for n, row in enumerate(ids):
        together.setdefault(tuple(row[:SHORTEST]) if share else (), []).append(n)
    groups = []
    for start, rows in together.items():
        common = _common([ids[n] for n in rows]) if len(start) == SHORTEST and len(rows) > 1 else 0
        by_length: dict[int, list[int]] = {}
        for n in sorted(rows, key=lambda n: len(ids[n])) if share else rows:
            by_length.setdefault(0 if share else len(ids[n]), []).append(n)
        chunks = [some[a : a + batch] for some in by_length.values() for a in range(0, len(some), batch)]
        batches = [_batch(some, [ids[n][common:] for n in some]) for some in chunks]
        groups.append(Group(torch.tensor(ids[rows[0]][:common], dtype=torch.long), batches))
    return groups


def _batch(rows: list[int], ids: list[list[int]]) -> Batch:
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], dtype=torch.long)
    return Batch(torch.tensor(rows), padded, torch.tensor([len(row) - 1 for row in ids]))


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
    for b in group.batches:
        ids, (kept, at) = b.ids.to(device), b.ends.unique(return_inverse=True)
        if cache is None:
            whole = torch.cat([prefix.expand(len(ids), -1), ids], 1)
            out = model(whole, use_cache=False, logits_to_keep=kept.to(device) + prefix.shape[1])
        else:
            own = copy.deepcopy(cache)
            own.reorder_cache(torch.zeros(len(ids), dtype=torch.long, device=device))
            out = model(ids, **{word: own}, use_cache=True, logits_to_keep=kept.to(device))
        yield b.rows, out.logits[torch.arange(len(ids)), at.to(device)].float().cpu()


def _prefilled(model: Any, prefix: Tensor, word: str) -> Any:
    """The cache of `prefix [1, P]`, or None where the model keeps anything else than keys and values, or nothing."""
    cache = getattr(model(prefix, use_cache=True, logits_to_keep=1), word, None)
    layers = getattr(cache, "layers", None)
    plain = layers and all(hasattr(layer, "keys") and not hasattr(layer, "conv_states") for layer in layers)
    return cache if plain else None
