"""Tables and picture from the lines `flux_curve.py` wrote.

python benchmarks/flux_curve_plot.py out/flux-curve/lines.jsonl --length 1024 --png docs/images/flux-curve.png
"""

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from flux_curve import HOLISTIC, read

from hfpatch.calibrate.intervals import wilson

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Point = tuple[float, int, int]


def main() -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("lines", type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    lines = read(args.lines)
    found = Found([d for d in lines if d["length"] == args.length], [d for d in lines if d["task"] == "ranking"])
    found.routes()
    curves = found.curves()
    for name, points in curves.items():
        for share, hits, n in points:
            print(f"| {name} | {share:.1%} | {told(hits, n)} |")
    if args.png:
        draw(found, curves, args)


class Found:
    """The lines of one length by variant and task."""

    def __init__(self, lines: list[dict[str, Any]], rankings: list[dict[str, Any]]) -> None:
        self.at = {(d["variant"], d["task"]): d for d in lines if d["task"] != "ranking"}
        self.scores = {d["variant"]: d["scores"] for d in rankings}
        self.lists = {v.removeprefix("list "): d for (v, t), d in self.at.items() if v.startswith("list")}
        self.layers = max(len(d["routes"][0]) for d in self.at.values())
        self.routers = sorted({v for v, _ in self.at if not v.startswith("list")})

    def routes(self) -> None:
        """Shares of sparse layers by task, and what the loss of the continued text becomes."""
        for router in self.routers:
            for (v, task), d in self.at.items():
                if v == router:
                    per_layer = [statistics.mean(r[n] == "s" for r in d["routes"]) for n in range(self.layers)]
                    layers = ", ".join(f"{x:.0%}" for x in per_layer)
                    print(f"| {router} | {task} | {d['sparse']:.0%} | {layers} | {d['loss']:.3f} | {d['n']} |")
        for variant in ("list ", "list " + "".join(map(str, range(self.layers)))):
            for task in HOLISTIC:
                if (variant, task) in self.at:
                    print(f"| {variant} | {task} | | | {self.at[variant, task]['loss']:.3f} |")

    def curves(self) -> dict[str, list[Point]]:
        """Share of sparse layers, hits and samples of every kind of list, and of the routers."""
        needle = {v.removeprefix("list "): d for (v, t), d in self.at.items() if t == "needle" and v[:4] == "list"}
        curves: dict[str, list[Point]] = {}
        if len(needle) == 2**self.layers:
            orders = {"last layers sparse": range(self.layers - 1, -1, -1), "first layers sparse": range(self.layers)}
            for name, by in (("output error", "error"), ("entropy", "entropy")):
                score = self.scores[by]
                orders[f"ranked by {name}"] = sorted(range(self.layers), key=lambda n, s=score: s[n])
            for name, order in orders.items():
                chosen = ["".join(map(str, sorted(list(order)[:k]))) for k in range(self.layers + 1)]
                curves[name] = [self.point(needle[c]) for c in chosen]
            every = [[d for v, d in needle.items() if len(v) == k] for k in range(self.layers + 1)]
            curves["mean of all lists (random)"] = [self.pooled(some) for some in every]
            curves["best list"] = [self.point(max(some, key=lambda d: d["hits"])) for some in every]
        for router in self.routers:
            if (router, "needle") in self.at:
                curves[f"router {router}"] = [self.point(self.at[router, "needle"])]
        return curves

    def mixed_share(self, router: str) -> float:
        """Mean share of sparse layers over needles and holistic prompts, half and half."""
        holistic = statistics.mean(self.at[router, t]["sparse"] for t in HOLISTIC)
        return (self.at[router, "needle"]["sparse"] + holistic) / 2

    @staticmethod
    def point(d: dict[str, Any]) -> Point:
        return d["sparse"], d["hits"], d["n"]

    @staticmethod
    def pooled(some: Iterable[dict[str, Any]]) -> Point:
        rows = list(some)
        return rows[0]["sparse"], sum(d["hits"] for d in rows), sum(d["n"] for d in rows)


def interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    return wilson(torch.arange(n) < hits)


def told(hits: int, n: int) -> str:
    """Share with its interval, in percent."""
    low, high = interval(hits, n)
    return f"{hits / n:.0%} [{low * 100:.0f}, {high * 100:.0f}] | {n}"


def draw(found: Found, curves: dict[str, list[Point]], args: argparse.Namespace) -> None:
    """Needles by share of sparse layers: for needle prompts alone, and for a mixture with holistic ones."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), sharey=True)
    marks = iter("osv^D<")
    for number, (name, points) in enumerate(curves.items()):
        router = name.removeprefix("router ") if name.startswith("router ") else None
        style: dict[str, Any] = {"linestyle": "none", "marker": "*", "markersize": 13, "zorder": 5}
        if router is None:
            style = {"marker": next(marks), "markersize": 5, "linewidth": 1.2, "fillstyle": "none"}
        for side, axis in enumerate(axes):
            x = [found.mixed_share(router) if side and router else share for share, _, _ in points]
            x = x if router else [at + 0.008 * (number - 2.5) for at in x]
            y = [hits / n for _, hits, n in points]
            ends = [interval(hits, n) for _, hits, n in points]
            errors = [[max(0.0, a - low) for a, (low, _) in zip(y, ends, strict=True)],
                      [max(0.0, high - a) for a, (_, high) in zip(y, ends, strict=True)]]  # fmt: skip
            label = f"trained, target {router.rsplit('-', 1)[-1]} %" if router else name
            axis.errorbar(x, y, yerr=errors, capsize=2, elinewidth=0.7, label=label, **style)
    for axis, title in zip(axes, ("needle prompts alone", "half needles, half prose and copying"), strict=True):
        axis.set(xlabel="share of sparse layers", title=title, xlim=(-0.05, 1.05), ylim=(-0.04, 1.06))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"needles found, {args.length} tokens")
    axes[0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    args.png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.png, dpi=130)


if __name__ == "__main__":
    main()
