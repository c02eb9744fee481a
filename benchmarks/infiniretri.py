"""Time and memory of reading by length of the text: a fresh process per length, the text streamed.

python benchmarks/infiniretri.py --lengths 32768 65536 131072 262144 --repeat 3
python benchmarks/infiniretri.py --lengths 65536 1048576
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from hfpatch.evals.run.peak import peak_reader, trim
from hfpatch.evals.tasks.answers import holds
from hfpatch.evals.tasks.stream import stream
from hfpatch.evals.testbed import load

from hfpatch import patched
from hfpatch.text import grammar
from hfpatch.text.sources import sentences

SETTINGS: dict[str, Any] = {
    "layers": [2], "template": "{context}{question}", "chunk_tokens": 512, "top_tokens": 64, "keep_budget": 128,
}  # fmt: skip


def read_once(patch: Any, tokenizer: Any, length: int, seed: int) -> dict[str, float]:
    """Seconds by the clock and of the processor for one text, needle at a random depth."""
    rng = random.Random(f"{length}-{seed}")
    key, value = grammar.random_key(rng), grammar.random_value(rng)
    pieces = stream(tokenizer, [grammar.needle(key, value)], [rng.random()], sentences("prose", rng), length)
    start, busy = time.perf_counter(), time.process_time()
    found = patch.retrieve(pieces, grammar.question(key), tokenizer=tokenizer, progress=False)
    took = {"seconds": time.perf_counter() - start, "busy": time.process_time() - busy}
    return {**took, "chunks": found.chunks, "kept": float(holds(found.text, value))}


def child(length: int, repeat: int, threads: int) -> dict[str, Any]:
    """All readings of one length in this process."""
    torch.set_num_threads(threads)
    model, tokenizer = load()
    with patched(model, "infiniretri", **SETTINGS) as patch:
        read_once(patch, tokenizer, 2048, -1)
        trim()
        reader = peak_reader(torch.device("cpu"))
        reader.reset()
        before = reader.now()
        runs = [read_once(patch, tokenizer, length, n) for n in range(repeat)]
    return {"runs": runs, "before": before, "peak": reader.peak()}


def main() -> None:
    """Print a line per length and the ratios of the times of doubled lengths."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", type=int)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.repeat, args.threads)))
        return
    medians: dict[int, dict[str, float]] = {}
    for length in sorted(args.lengths):
        command = [sys.executable, __file__, "--child", str(length), "--repeat", str(args.repeat)]
        done = subprocess.run(
            [*command, "--threads", str(args.threads)], stdout=subprocess.PIPE, text=True, check=True
        )
        made = json.loads(done.stdout.splitlines()[-1])
        medians[length] = {k: statistics.median(r[k] for r in made["runs"]) for k in ("seconds", "busy")}
        line = f"{length:>8} tokens, {made['runs'][0]['chunks']:>4} chunks: {medians[length]['seconds']:.2f} s"
        line += f" by the clock, {medians[length]['busy']:.2f} s of processor; peak {made['peak'] / 2**20:.1f} MiB, "
        line += f"{(made['peak'] - made['before']) / 2**20:.1f} MiB above the loaded model"
        print(line + f"; needle kept {sum(r['kept'] for r in made['runs']):g} of {args.repeat}", flush=True)
    for length, took in medians.items():
        if 2 * length in medians:
            ratios = {k: medians[2 * length][k] / took[k] for k in took}
            print(
                f"t({2 * length}) / t({length}) = {ratios['seconds']:.3f} by the clock, {ratios['busy']:.3f} processor"
            )


if __name__ == "__main__":
    main()
