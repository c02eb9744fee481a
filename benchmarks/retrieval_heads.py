"""What head_scale does to heads that retrieve and to heads that look at the first token, beside random heads.

python benchmarks/retrieval_heads.py MODEL --haystack novel.txt --out out/heads

A head's retrieval score (after arXiv 2404.15574) is the share of an answer's tokens at which the key it attends to
most is the needle's own copy of that token; first-token heads are those with most attention on key 0 there. Both are
taken from other prompts than those measured: answer NLL of needles, and NLL of 256 tokens ahead of the question.
Each finished choice of heads goes to `lines.jsonl` in the folder; a second start goes on after the last.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.answer_nll import answer_ids
from hfpatch.evals.run.models import Loaded, load_model
from torch import Tensor
from torch.nn import functional as F

from hfpatch import patched
from hfpatch.api import patched_with
from hfpatch.core.audit_rows import row_logits
from hfpatch.core.call import AttentionCall
from hfpatch.core.method import Method
from hfpatch.methods.dense import DenseConfig
from hfpatch.methods.head_scale import HeadScaleConfig

DEPTHS = (10, 35, 60, 85)
TEXT, SPARE = 256, 88
Pair = list[int]


class Watch(Method):
    """Where the answer's queries look: `copied`, `first [layers, Hq]`, summed over tokens."""

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__(DenseConfig())
        self.copied, self.first = (torch.zeros(layers, heads) for _ in range(2))
        self.rows = self.targets = torch.zeros(0, dtype=torch.long)

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        weights = torch.cat(list(row_logits(call, self.rows)), 2)[0].softmax(-1)  # [Hq, R, Lk]
        self.copied[call.layer] += (weights.argmax(-1) == self.targets).float().mean(-1)
        self.first[call.layer] += weights[..., 0].mean(-1)


def main() -> None:
    """Score the heads, then measure what is missing and append it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--haystack", default="prose")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=2, help="needles per depth")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "lines.jsonl"
    done = {json.loads(line)["name"] for line in file.read_text().splitlines()} if file.is_file() else set()
    loaded = load_model(args.model, "float32", None)
    watch = scored(loaded, args)
    best = ranked(watch.copied)
    print("copied, by head:", {f"{n}.{h}": round(float(watch.copied[n, h]), 2) for n, h in best[:24]}, flush=True)
    measured = list(prompts(loaded, args, seed=7))
    for name, scales in choices(watch, args.counts):
        if name in done:
            continue
        with patched(loaded.model, HeadScaleConfig(scales=scales) if scales else DenseConfig()):
            found = [nll(loaded.model, ids, start) for ids, start in measured]
        answer, text = (sum(f[n] for f in found) / len(found) for n in (0, 1))
        with file.open("a") as out:
            line = {"name": name, "answer": answer, "text": text, "scales": scales, "by_prompt": found}
            out.write(json.dumps(line) + "\n")
        print(f"{name}: answer NLL {answer:.3f}, text {text:.4f}", flush=True)


def prompts(loaded: Loaded, args: argparse.Namespace, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Ids of prompt and answer, and where the answer begins."""
    for sample in NiahJob([args.length], DEPTHS, args.samples, haystack=args.haystack).build(
        loaded, args.length, seed
    ):
        ids, start = answer_ids(loaded.tokenizer, sample.prompt, sample.continuation)
        yield torch.tensor(ids), start


@torch.inference_mode()
def scored(loaded: Loaded, args: argparse.Namespace) -> Watch:
    """Scores of all heads, means over needles of another seed."""
    config = loaded.model.config.get_text_config()
    watch = Watch(config.num_hidden_layers, config.num_attention_heads)
    given = list(prompts(loaded, args, seed=1))
    for ids, start in given:
        told = ids[start:].tolist()
        places = [n for n in range(start - len(told) + 1) if ids[n : n + len(told)].tolist() == told]
        assert places, "the needle's answer has other tokens than the answer"
        watch.rows = torch.arange(start - 1, len(ids) - 1)
        watch.targets = torch.arange(places[0], places[0] + len(told))
        with patched_with(loaded.model, [watch]):
            loaded.model(ids[None], use_cache=False, logits_to_keep=1)
    watch.copied /= len(given)
    watch.first /= len(given)
    return watch


def ranked(scores: Tensor) -> list[Pair]:
    """`[layer, head]` pairs, highest first."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [[n // scores.shape[1], n % scores.shape[1]] for n in order]


def choices(watch: Watch, counts: list[int]) -> Iterator[tuple[str, list[list[float]]]]:
    """Names, and heads with their factors."""
    copying, first = ranked(watch.copied), ranked(watch.first)
    most = max(counts)
    yield "as it is", []
    for k in counts:
        yield f"{k} retrieval heads removed", [[*p, 0.0] for p in copying[:k]]
    for k in counts:
        others = random.Random(k).sample([p for p in copying if p not in copying[:most]], k)
        yield f"{k} random other heads removed", [[*p, 0.0] for p in others]
    for k in counts:
        yield f"{k} first-token heads removed", [[*p, 0.0] for p in first[:k]]
    for factor in (0.8, 1.2, 1.5):
        yield f"{most} retrieval heads times {factor}", [[*p, factor] for p in copying[:most]]


@torch.inference_mode()
def nll(model: Any, ids: Tensor, start: int) -> tuple[float, float]:
    """Mean NLL of the answer's tokens, which begin at `start`, and of `TEXT` tokens ahead of the question."""
    keep = len(ids) - start + SPARE + TEXT
    logits = model(ids[None], use_cache=False, logits_to_keep=keep).logits[0, :-1]
    each = F.cross_entropy(logits, ids[-len(logits) :], reduction="none")
    return float(each[start - len(ids) :].mean()), float(each[:TEXT].mean())


if __name__ == "__main__":
    main()
