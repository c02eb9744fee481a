"""PNG plots of scores by length, accuracy against density, and perplexity by position."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from ..run.stats import tokens
from .plots import COLOURS, STYLE, bars, length_axis, look, names_of, save

Row = dict[str, Any]
PERCENT = FuncFormatter(lambda y, _: f"{y:.0%}")


def scores(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Score by prompt length, or by task where there are no lengths."""
    names, lengths = names_of(rows), sorted({r["length"] for r in rows if "length" in r})
    if len(lengths) == 1:
        return _score_bars(rows, path, f"{title}, prompts of {tokens(lengths[0])} tokens")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.5, 4.2))
        if lengths:
            for n, name in enumerate(names):
                own = sorted((r for r in rows if r["variant"] == name), key=lambda r: r["length"])
                axis.plot([r["length"] for r in own], [r["score"] for r in own], label=name, **look(n))
            length_axis(axis, lengths)
        else:
            tasks = list(dict.fromkeys(r["task"] for r in rows))
            for n, name in enumerate(names):
                found = {r["task"]: r["score"] for r in rows if r["variant"] == name}
                width = 0.8 / len(names)
                x = [k - 0.4 + (n + 0.5) * width for k in range(len(tasks))]
                axis.bar(x, [found.get(t, 0) for t in tasks], width, label=name, color=COLOURS[n % len(COLOURS)])
            axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
        axis.set_ylim(-0.03, 1.05)
        axis.yaxis.set_major_formatter(PERCENT)
        axis.set_ylabel("score")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 3))
        figure.suptitle(title)
        return save(figure, path)


def _score_bars(rows: Sequence[Row], path: Path, title: str) -> Path:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.5, 0.28 * len(rows) + 1.4))
        bars([(r["variant"], r["score"]) for r in rows], axis, ".0%")
        axis.set_xlabel("score")
        axis.set_xlim(0, 1.1)
        axis.xaxis.set_major_formatter(PERCENT)
        figure.suptitle(title)
        return save(figure, path)


def accuracy_density(points: Sequence[Row], path: Path, title: str) -> Path:
    """Mean score against the share of keys attended to; settings of one method are joined by a line."""
    families: dict[str, list[Row]] = {}
    for p in points:
        families.setdefault(p["variant"].split(":")[0], []).append(p)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.5, 4.6))
        for n, (family, own) in enumerate(families.items()):
            own = sorted(own, key=lambda p: p["density"])
            x, y = [p["density"] for p in own], [p["score"] for p in own]
            line = {"linestyle": "-" if len(own) > 1 else "none", "label": family, "clip_on": False}
            axis.plot(x, y, **{**look(n), "markersize": 8, **line})
        axis.set_xlabel("keys attended to (mean over the tasks)")
        axis.set_ylabel("score (mean over the tasks)")
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, 1.05)
        axis.xaxis.set_major_formatter(PERCENT)
        axis.yaxis.set_major_formatter(PERCENT)
        figure.legend(loc="outside lower center", ncols=min(len(families), 4))
        figure.suptitle(title)
        return save(figure, path)


def perplexity(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Perplexity by position in the longest prompts."""
    names, longest = names_of(rows), max(r["length"] for r in rows)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.5, 4.2))
        for n, name in enumerate(names):
            own = sorted(
                (r for r in rows if r["variant"] == name and r["length"] == longest), key=lambda r: r["start"]
            )
            axis.plot(
                [(r["start"] + r["stop"]) / 2 for r in own], [r["perplexity"] for r in own], label=name, **look(n)
            )
        axis.set_xlabel("position of the predicted token")
        axis.set_ylabel("perplexity (lower is better)")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 3))
        figure.suptitle(f"{title}, prompts of {longest} tokens")
        return save(figure, path)
