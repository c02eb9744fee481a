"""Keys and values a cache holds after a prompt read in chunks, and how well the text goes on, per patch.

Memory is the storage behind the layers' tensors, room for new keys included. The text that follows comes in one call.

    python benchmarks/kv_memory.py MODEL --text FILE --length 1024 --patch snapkv:budget=256 --patch keydiff:budget=256
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from hfpatch.evals.run.models import load_model
from hfpatch.evals.run.variants import parse_variants
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from hfpatch.text.prompt_ids import prompt_ids

FOLLOWING = 100


def held(cache: Any) -> float:
    """MiB of storage behind the keys and values of all layers."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values)) / 2**20


@torch.inference_mode()
def measured(model: Any, ids: Tensor, chunk: int) -> tuple[float, float, float]:
    """MiB at most between chunks, MiB after the prompt, and nats per token of the text that follows."""
    cache, most = DynamicCache(config=model.config), 0.0
    prompt = ids.shape[1] - FOLLOWING
    for start in range(0, prompt, chunk):
        out = model(ids[:, start : min(start + chunk, prompt)], past_key_values=cache, logits_to_keep=1)
        most = max(most, held(cache))
    after = held(cache)
    rest = model(ids[:, prompt:-1], past_key_values=cache).logits
    logits = torch.cat([out.logits, rest], 1)[0].float()
    return most, after, float(cross_entropy(logits, ids[0, prompt:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=1 << 30)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--patch", "-p", action="append", default=[])
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    loaded, size = load_model(args.model, args.dtype), args.length + FOLLOWING
    whole = prompt_ids(loaded.tokenizer, args.text.read_text(encoding="utf-8")[: 8 * size * args.prompts])
    prompts = torch.tensor(whole[: size * args.prompts], device=loaded.device).view(args.prompts, 1, size)
    print(f"{'patch':44} {'between chunks':>14} {'after prompt':>12} {'nats/token':>10}")
    for variant in parse_variants(args.patch):
        with variant.applied(loaded.model):
            found = torch.tensor([measured(loaded.model, ids, args.chunk) for ids in prompts])
        most, after, nats = found.mean(0).tolist()
        print(f"{variant.name:44} {most:10.1f} MiB {after:8.1f} MiB {nats:10.3f}", flush=True)


if __name__ == "__main__":
    main()
