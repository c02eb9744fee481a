"""Part 5: a random Llama of eight layers of an 8B shape: time to first token, time per token, peak memory."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from zoo import cache_name

from gpu_parts.choosing import settings, survived
from gpu_parts.context import Context
from gpu_parts.device import spread
from gpu_parts.exact import TOLERANCE, apart, exact
from gpu_parts.plan import OK, SKIPPED, WRONG, Case, Row
from gpu_parts.right import executors
from hfpatch import get_patch, patched
from hfpatch.config.registry import make_config
from hfpatch.errors import HfpatchError
from hfpatch.ops import watched
from hfpatch.ops.call import Problem

PATCHES = ("unpatched", "dense", "streaming", "block_topk+quest", "dhsa", "flux cropped")
CACHES = ("dynamic", "static")
CHECKED = 2085
STEPS, ROOM = 8, 128
FEW = 2  # steps of a dry run
SIZES = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "num_hidden_layers": 8, "vocab_size": 4096,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
    "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
}  # fmt: skip


def cases(context: Context) -> list[Case]:
    """A case per length, cache and patch; the unpatched model goes first, as what the others are compared with."""
    lengths = ("8k",) if context.dry else tuple(context.lengths())
    return [
        Case(f"{length} {cache} {patch}", partial(_rows, context, length, cache, patch))
        for length in lengths
        for cache in CACHES
        for patch in PATCHES
    ]


@lru_cache(maxsize=1)
def model_of(context: Context) -> LlamaForCausalLM:
    """The model, made where it runs."""
    sizes = SMALL if context.dry else SIZES
    config = LlamaConfig(**sizes, max_position_embeddings=1 << 18, tie_word_embeddings=False)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with context.device.torch:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(kept)


def able(context: Context) -> list[str]:
    """Executors that part 1 found nothing wrong with where it is about this model's heads."""
    wrong = [f for f in context.options.failed if f.endswith("bfloat16 128/128 wide")]
    return [name for name in executors() if not any(f.startswith(f"{name} ") for f in wrong)]


def patch_of(context: Context, name: str, tokens: int, executor: str) -> list[tuple[str, dict[str, Any]]]:
    """Methods and settings of a patch."""
    by = {"executor": executor}
    known = settings(context, tokens)
    half = f"{(SMALL if context.dry else SIZES)['num_hidden_layers'] // 2}-"
    window = known["streaming"][1]
    flux = {"router": "static", "sparse_layers": half, "sparse_settings": window, "crop_cache": True}
    made = {
        "dense": [("dense", {})],
        "streaming": [known["streaming"]],
        "block_topk+quest": [known["block_topk"], known["quest"]],
        "dhsa": [known["dhsa"]],
        "flux cropped": [("flux", flux)],
    }[name]
    return [(method, {**given, **by}) for method, given in made]


def _patched(context: Context, model: Any, name: str, tokens: int, executor: str) -> Any:
    if name == "unpatched":
        return nullcontext()
    return patched(model, [make_config(method, given) for method, given in patch_of(context, name, tokens, executor)])


def check(context: Context, name: str, executor: str) -> Row:
    """Every attention of a prompt and two steps against float64, as the layers of the patched model run it."""
    model, length = model_of(context), 48 if context.dry else CHECKED
    seen: list[float] = []
    allowed = TOLERANCE[torch.bfloat16]

    def look(p: Problem, out: Tensor, executor: str) -> None:
        rows = torch.tensor(sorted({0, p.at.Lq // 3, p.at.Lq // 2, p.at.Lq - 1}), device=out.device)
        seen.append(apart(exact(p, rows)[0], out[:, rows]))

    ids = _ids(context, length + 2)
    with _patched(context, model, name, length, executor), watched(look):
        cache = DynamicCache()
        finite = [bool(_forward(model, ids[:, :length], cache).isfinite().all())]
        finite += [bool(_forward(model, ids[:, n : n + 1], cache).isfinite().all()) for n in (length, length + 1)]
    error = max(seen, default=0.0)
    row: Row = {"error": error, "checked": len(seen), "allowed": allowed, "status": OK}
    if not error <= allowed or not all(finite):
        why = f"error {error:.1e} of an attention call, allowed {allowed:.0e}" if all(finite) else "logits not finite"
        row |= {"status": WRONG, "why": why}
    return row


def _ids(context: Context, length: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(3, 100, (1, length), device=context.device.torch)


def _forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    given = {cache_name(model): cache}
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **given).logits


def _first(context: Context, tokens: int) -> tuple[Row, Any]:
    """Time to first token of a prompt, its peak memory, and the cache."""
    model, ids, caches = model_of(context), _ids(context, tokens), [DynamicCache()]

    def prefill() -> None:
        caches[0] = DynamicCache()
        _forward(model, ids, caches[0])

    peak = context.device.peak(prefill)
    ms = [context.device.timed(prefill)[0] for _ in range(1 if context.dry else 2 if tokens > 1 << 16 else 3)]
    found = spread(ms)
    return {"ttft_ms": found["ms"], "ttft_low": found["low"], "ttft_high": found["high"], "peak_mib": peak}, caches[0]


def _full(context: Context, tokens: int) -> StaticCache:
    """A static cache that holds random keys and values of so many tokens."""
    model = model_of(context)
    config = model.config
    cache = StaticCache(config, max_cache_len=tokens + ROOM)
    place = {"cache_position": torch.arange(tokens, device=context.device.torch)}
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        k, v = (torch.randn(shape, dtype=torch.bfloat16, device=context.device.torch) for _ in range(2))
        cache.update(k, v, layer, place)
    return cache


def _per_token(context: Context, cache: Any) -> Row:
    """Time per token, of runs of eight steps, the first of which warms up."""
    model, token = model_of(context), _ids(context, 1)
    many = FEW if context.dry else STEPS

    def steps() -> None:
        for _ in range(many):
            token.copy_(_forward(model, token, cache).argmax(-1))

    steps()
    found = spread([context.device.timed(steps, flush=False)[0] / many for _ in range(1 if context.dry else 5)])
    return {"tpot_ms": found["ms"], "tpot_low": found["low"], "tpot_high": found["high"]}


def measure(context: Context, length: str, kind: str, patch: str, executor: str = "") -> Row:
    """Times of the model under a patch."""
    model, tokens = model_of(context), context.lengths()[length]
    with _patched(context, model, patch, tokens, executor):
        first, cache = _first(context, tokens) if kind == "dynamic" else ({}, _full(context, tokens))
        row = {**first, **_per_token(context, cache)}
        if patch != "unpatched":
            ran = (dict(line.stats.executors) for line in get_patch(model).report().lines)
            row["executors"] = sorted({name for found in ran for name in found})
    return row


@lru_cache(maxsize=2)
def _unpatched(context: Context, length: str, kind: str) -> Row:
    return measure(context, length, kind, "unpatched")


def _rows(context: Context, length: str, kind: str, patch: str) -> Iterator[Row]:
    named: Row = {"length": length, "cache": kind, "patch": patch}
    base: Callable[[], Row] = partial(_unpatched, context, length, kind)
    if patch == "unpatched":
        yield {**named, "status": OK, **base()}
        return
    for executor in able(context):
        row = survived(partial(_checked, context, length, kind, patch, executor))
        for time in ("ttft", "tpot"):
            if f"{time}_ms" in row:
                row[f"{time}_ratio"] = base()[f"{time}_ms"] / row[f"{time}_ms"]
        yield {**named, "executor": executor, **row}
        if row["status"] == OK:
            return


def _checked(context: Context, length: str, kind: str, patch: str, executor: str) -> Row:
    """Times of the model under a patch whose attention is right."""
    try:
        found = check(context, patch, executor)
        return found if found["status"] != OK else {**found, **measure(context, length, kind, patch, executor)}
    except HfpatchError as e:
        return {"status": SKIPPED, "why": str(e)}
