"""Which layers can go sparse: answer NLL of needles and NLL of text, by how many layers and who chose them.

python benchmarks/flux_layers.py MODEL --haystack novel.txt --out out/layers --ranking out/by-audit out/by-error

A ranking is a folder that `hfpatch calibrate flux --router audit` (or error, entropy) has written; beside them stand
the first layers, the last and random ones. Sink + window is the sparse branch; needles stand outside the window and
before the text that is scored, 512 tokens ahead of the question. One forward pass per prompt gives both figures. Each
finished list goes to `lines.jsonl` in the folder; a second start goes on after the last.
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
from hfpatch.evals.run.models import load_model
from torch import Tensor
from torch.nn import functional as F

from hfpatch import PatchConfig, patched
from hfpatch.methods.flux import FluxConfig

DEPTHS = (10, 25, 40, 55)
TEXT, SPARE = 512, 88  # tokens of text that are scored, and room for the question after them


def main() -> None:
    """Measure what is missing and append it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--haystack", default="prose")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranking", type=Path, nargs="*", default=[])
    parser.add_argument("--random", type=int, default=2, help="random lists per share")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.75])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=2, help="needles per depth")
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "lines.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    loaded = load_model(args.model, "float32", None)
    job = NiahJob([args.length], DEPTHS, args.samples, haystack=args.haystack)
    prompts = [answer_ids(loaded.tokenizer, s.prompt, s.continuation) for s in job.build(loaded, args.length, seed=7)]
    for name, layers in lists(args, loaded.model.config.get_text_config().num_hidden_layers):
        if any((d["name"], d["sparse"]) == (name, layers) for d in done):
            continue
        config = FluxConfig(sparse_layers=layers or None, sparse_settings={"sink": 4, "window": args.window})
        with patched(loaded.model, config):
            found = [nll(loaded.model, torch.tensor(ids), start) for ids, start in prompts]
        answer, text = (sum(f[n] for f in found) / len(found) for n in (0, 1))
        line = {"name": name, "sparse": layers, "answer": answer, "text": text, "by_prompt": found}
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{name}, {len(layers)} layers sparse: answer NLL {answer:.3f}, text {text:.4f}", flush=True)


def lists(args: argparse.Namespace, layers: int) -> Iterator[tuple[str, list[int]]]:
    """Names of choices, and the layers that each sends sparse."""
    yield from (("none", []), ("all", list(range(layers))))
    rankings: dict[str, list[float]] = {
        f.name: PatchConfig.from_pretrained(f).tensors["0.ranking"].tolist() for f in args.ranking
    }
    for share in args.shares:
        k = int(share * layers)
        for name, scores in rankings.items():
            order = sorted(range(layers), key=lambda n, s=scores: s[n])  # type: ignore[misc]
            yield name, sorted(order[:k])
        yield "first", list(range(k))
        yield "last", list(range(layers - k, layers))
        for n in range(args.random):
            yield f"random {n}", sorted(random.Random(f"{n}-{share}").sample(range(layers), k))


@torch.inference_mode()
def nll(model: Any, ids: Tensor, start: int) -> tuple[float, float]:
    """Mean NLL of the answer's tokens, which begin at `start`, and of `TEXT` tokens ahead of the question."""
    keep = len(ids) - start + SPARE + TEXT
    logits = model(ids[None], use_cache=False, logits_to_keep=keep).logits[0, :-1]
    each = F.cross_entropy(logits, ids[-len(logits) :], reduction="none")
    return float(each[start - len(ids) :].mean()), float(each[:TEXT].mean())


if __name__ == "__main__":
    main()
