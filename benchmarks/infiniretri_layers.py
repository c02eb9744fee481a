"""Which layers of a chat model rank a needle's sentence first: `rank_layers` of infiniretri, layer by layer.

python benchmarks/infiniretri_layers.py MODEL [--probes 8] [--chunk 1024]
"""

import argparse

from hfpatch.evals.run.models import load_model

from hfpatch import get_patch, patch_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=1024)
    args = parser.parse_args()
    loaded = load_model(args.model, "float32")
    patch_model(loaded.model, "infiniretri", chunk_tokens=args.chunk)
    patch = get_patch(loaded.model)
    ranked = patch.rank_layers(tokenizer=loaded.tokenizer, probes=args.probes)
    for layer, score in sorted(ranked):
        print(f"{layer:3d} {score:.2f}{' default' if layer in patch.layers else ''}", flush=True)
