"""Greedy exact match by task, haystack, length and depth: `python -m hfpatch.evals.testbed.evaluate`."""

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hfpatch import patched
from hfpatch.text import grammar

from . import CHECKPOINT

HAYSTACKS = {"grammar": grammar.grammar_sentences, "prose": grammar.prose_sentences}


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt and of its answer; `spans` are the token ranges of the facts."""

    ids: list[int]
    answer: list[int]
    spans: list[tuple[int, int]]


def _filler(encode: "Encoder", sentences: Iterator[str], room: int) -> list[list[int]]:
    """Whole sentences, `room` tokens at most; stops after a few that are too long."""
    found, misses = [], 0
    while misses < 5:
        ids = encode(" " + next(sentences))
        if len(ids) > room:
            misses += 1
            continue
        found.append(ids)
        room -= len(ids)
    return found


class Encoder:
    """Text to ids without `<s>`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bos = tokenizer.bos_token_id
        self._encode = tokenizer.backend_tokenizer.encode  # type: ignore[attr-defined]

    def __call__(self, part: str) -> list[int]:
        return list(self._encode(part, add_special_tokens=False).ids)


def build_prompt(
    encode: Encoder, task: grammar.Task, haystack: str, length: int, depth: float, rng: random.Random
) -> Prompt:
    """A prompt of about `length` tokens (never more), the asked fact at `depth` (0 start, 1 end)."""
    question, answer = task.turns[0]
    tail, told = encode("\n" + question), encode(answer)
    facts = [encode(" " + fact) for fact in task.facts]
    room = length - 1 - len(tail) - len(told) - sum(map(len, facts))
    segments = _filler(encode, HAYSTACKS[haystack](rng), room)
    places = [rng.random() for _ in facts]
    if not task.spread:
        places = [1.0] * len(facts)
    elif "Let " in task.facts[0]:
        places.sort()
    else:
        places[task.target] = depth
    placed = [(float(i), 0, s) for i, s in enumerate(segments)]
    placed += [(p * len(segments) - 0.5, 1, fact) for p, fact in zip(places, facts, strict=True)]
    ids, spans = [encode.bos], []
    for _, is_fact, part in sorted(placed, key=lambda item: item[0]):
        if is_fact:
            spans.append((len(ids), len(ids) + len(part)))
        ids += part
    return Prompt(ids + tail, told, spans)


@torch.no_grad()
def exact(model: LlamaForCausalLM, prompts: list[Prompt], mask_facts: bool = False, batch_size: int = 8) -> list[bool]:
    """Whether greedy decoding gives each answer exactly; `mask_facts` hides the facts from attention."""
    results = []
    for start in range(0, len(prompts), batch_size):
        group = prompts[start : start + batch_size]
        width = max(len(p.ids) for p in group)
        ids = torch.full((len(group), width), model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(group):
            pad = width - len(prompt.ids)
            ids[row, pad:], mask[row, pad:] = torch.tensor(prompt.ids), 1
            for begin, end in prompt.spans if mask_facts else ():
                mask[row, pad + begin : pad + end] = 0
        ids, mask = ids.to(model.device), mask.to(model.device)
        steps = max(len(p.answer) for p in group)
        settings = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None}
        grown = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:].tolist()
        results += [g[: len(p.answer)] == p.answer for g, p in zip(grown, group, strict=True)]
    return results


def cell(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: str, haystack: str, length: int,
    samples: int = 50, seed: int = 1234, mask_facts: bool = False, deepest: float = 1.0,
) -> list[tuple[float, bool]]:  # fmt: skip
    """(depth, exact) of `samples` prompts whose depths run evenly from 0 to `deepest`."""
    rng, encode = random.Random(f"{seed} {task} {haystack} {length}"), Encoder(tokenizer)
    depths = [deepest * i / max(1, samples - 1) for i in range(samples)]
    tasks = [grammar.TASKS[task](rng) for _ in depths]
    pairs = zip(tasks, depths, strict=True)
    prompts = [build_prompt(encode, t, haystack, length, d, rng) for t, d in pairs]
    hits = exact(model, prompts, mask_facts, batch_size=max(1, min(10, 8192 // length)))
    return list(zip(depths, hits, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--tasks", default="single")
    parser.add_argument("--haystacks", default="grammar,prose")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mask-facts", action="store_true", help="hide the facts: accuracy must fall to zero")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--window", type=int, default=0, help="patch `streaming`, needles outside this window")
    parser.add_argument("--out", help="JSONL file for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = LlamaForCausalLM.from_pretrained(
        options.checkpoint, dtype=getattr(torch, options.dtype), local_files_only=True
    ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.checkpoint, local_files_only=True)
    window = patched(model, "streaming", window=options.window) if options.window else nullcontext()
    with window:
        for task in options.tasks.split(","):
            for haystack in options.haystacks.split(","):
                for length in map(int, options.lengths.split(",")):
                    _report(model, tokenizer, task, haystack, length, options)


def _report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: str, haystack: str, length: int,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Run one cell, print it and append it to the results."""
    start = time.monotonic()
    deepest = 1 - 1.5 * options.window / length
    settings = (options.samples, options.seed, options.mask_facts, deepest)
    rows = cell(model, tokenizer, task, haystack, length, *settings)
    score = sum(hit for _, hit in rows) / len(rows)
    missed = [round(depth, 2) for depth, hit in rows if not hit]
    print(f"{task} {haystack} {length}: {score:.3f} ({time.monotonic() - start:.0f} s) missed at {missed}", flush=True)
    if options.out:
        record = {"task": task, "haystack": haystack, "length": length, "exact": score, "window": options.window}
        with Path(options.out).open("a") as file:
            file.write(json.dumps({**record, "samples": len(rows), "missed": missed}) + "\n")


if __name__ == "__main__":
    main()
