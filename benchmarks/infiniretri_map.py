"""One heat map of all needle tasks of a finished run of the recipe infiniretri-beyond-window.

python benchmarks/infiniretri_map.py out/infiniretri-beyond-window docs/images/infiniretri.png
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from hfpatch.evals.jobs.scores import score_map
from hfpatch.evals.report.plots import draw


def pooled(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant, length and depth, all needle tasks together."""
    groups: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for s in samples:
        if s["job"].startswith("needle") or s["job"].startswith("streaming"):
            groups[s["variant"], s["length"], s["depth"]].append(s["score"])
    order = sorted(groups, key=lambda key: (key[0] != "infiniretri", *key))
    return [{"variant": v, "length": n, "depth": d, "score": mean(groups[v, n, d])} for v, n, d in order]


if __name__ == "__main__":
    lines = (Path(sys.argv[1]) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    found = score_map(pooled([json.loads(x) for x in lines]), "needles found")
    draw(found, Path(sys.argv[2]), "Needles found, both haystacks")
