"""Needles found and text predicted by share of sparse layers: every list of layers, and trained routers.

python benchmarks/flux_curve.py --out out/flux-curve --router out/flux-50 --lengths 1024 2048

The embedded model, sink + window as the sparse branch, no needle inside the window. An answer counts when greedy
decoding from the prompt begins with it; all its tokens are fed at once, which gives the same verdict. Each finished
line goes to `lines.jsonl` in the folder; a second start goes on after the last.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.testbed import load
from torch import Tensor
from torch.nn import functional as F

from hfpatch import PatchConfig, patched
from hfpatch.calibrate.flux.examples import HOLISTIC, RETRIEVAL, built_in_example
from hfpatch.calibrate.flux.ranking import rank_layers
from hfpatch.methods.flux import FluxConfig
from hfpatch.text.prompt_ids import prompt_ids

UNSEEN = ("multineedle", "tracking", "fewshot")
EVERY = ("needle", *HOLISTIC, *RETRIEVAL, *UNSEEN)
DEPTHS = (5, 20, 40, 60, 80)


def main() -> None:
    """Run what is missing and append it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--router", type=Path, nargs="*", default=[])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--samples", type=int, default=100, help="needles per length, holistic prompts per task / 4")
    parser.add_argument("--tasks", nargs="*", help="only these")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--lists", nargs="*", help="every list of layers and the rankings, or lists such as 013")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    curve = Curve(args)
    for router in args.router:
        curve.measure(router.name, PatchConfig.from_pretrained(router), EVERY)
    if args.lists is not None:
        curve.rank()
        layers = range(curve.model.config.num_hidden_layers)
        for k in range(len(layers) + 1):
            for chosen in (c for c in combinations(layers, k) if not args.lists or "".join(map(str, c)) in args.lists):
                config = FluxConfig(sparse_layers=list(chosen), sparse_settings=curve.settings)
                tasks = EVERY if k == 0 else ("needle", *HOLISTIC) if k == len(layers) else ("needle",)
                curve.measure("list " + "".join(map(str, chosen)), PatchConfig([config]), tasks)


class Curve:
    """The model, the prompts and the lines written so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.file = args, args.out / "lines.jsonl"
        self.model, self.tokenizer = load()
        self.settings = {"sink": 4, "window": args.window}
        self.done = {(d["variant"], d["task"], d["length"]) for d in read(self.file)}

    def write(self, variant: str, task: str, length: int, **found: Any) -> None:
        """Append one line."""
        with self.file.open("a") as file:
            file.write(json.dumps({"variant": variant, "task": task, "length": length, **found}) + "\n")
        print(variant, task, length, {k: v for k, v in found.items() if k != "routes"}, flush=True)

    def prompts(self, task: str, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Prompt and answer ids of one task."""
        if task == "needle":
            job = NiahJob([length], DEPTHS, self.args.samples // len(DEPTHS))
            for sample in job.samples_of(Loaded("embedded", self.model, self.tokenizer), length, seed=7):
                head = torch.tensor(prompt_ids(self.tokenizer, sample.prompt))
                told = self.tokenizer(f" {sample.answers[0]}", add_special_tokens=False)["input_ids"]
                last = len(head) * (1 - sample.meta["depth_reached"])
                assert last > self.args.window, "a needle stands inside the window"
                yield head, torch.tensor(told)
            return
        for n in range(self.args.samples // 4):
            e = built_in_example(self.tokenizer, task, length, random.Random(f"curve-{task}-{length}-{n}"))
            yield e.ids[: e.predict_from], e.ids[e.predict_from :]

    @torch.no_grad()
    def measure(self, variant: str, config: PatchConfig, tasks: tuple[str, ...]) -> None:
        """All tasks and lengths of one variant."""
        for length in self.args.lengths:
            chosen = [t for t in tasks if self.args.tasks is None or t in self.args.tasks]
            for task in (t for t in chosen if (variant, t, length) not in self.done):
                losses, hits, routes = [], [], []
                for head, told in self.prompts(task, length):
                    with patched(self.model, config) as patch:
                        logits = self.answer(head, told)
                        last: Any = patch.methods[0]
                        routes.append("".join("s" if last.last[n][0] else "F" for n in sorted(last.last)))
                    losses.append(float(F.cross_entropy(logits, told)))
                    hits.append(bool((logits.argmax(-1) == told).all()))
                self.write(variant, task, length, loss=sum(losses) / len(losses), hits=sum(hits), n=len(hits),
                           sparse="".join(routes).count("s") / len("".join(routes)), routes=routes)  # fmt: skip

    def answer(self, head: Tensor, told: Tensor) -> Tensor:
        """Logits of the answer's tokens `[n, V]`: the prompt in one call, the answer in another."""
        out = self.model(head[None], use_cache=True, logits_to_keep=1)
        first = out.logits[0]
        if len(told) == 1:
            return first
        more = self.model(told[None, :-1], past_key_values=out.past_key_values).logits[0]
        return torch.cat([first, more])

    def rank(self) -> None:
        """Scores of the layers by output error and by matrix entropy."""
        config = FluxConfig(sparse_settings=self.settings)
        kinds = RETRIEVAL + HOLISTIC
        texts = [
            built_in_example(self.tokenizer, kinds[n % len(kinds)], 1024, random.Random(f"rank-{n}"))
            for n in range(28)
        ]
        for by in ("error", "entropy"):
            if (by, "ranking", 1024) not in self.done:
                self.write(by, "ranking", 1024, scores=rank_layers(self.model, texts, config, by=by).tolist())


def read(file: Path) -> list[dict[str, Any]]:
    """The lines written so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


if __name__ == "__main__":
    main()
