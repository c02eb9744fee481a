"""PNG plots of a run; colours are told apart by colour-blind readers, and markers repeat what colours say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..run.stats import GIB, tokens

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e4e4e4", "axes.axisbelow": True, "legend.frameon": False, "savefig.dpi": 140,
    "figure.constrained_layout.use": True,
}  # fmt: skip
Row = dict[str, Any]


def names_of(rows: Sequence[Row]) -> list[str]:
    """Variants in the order they come."""
    return list(dict.fromkeys(r["variant"] for r in rows))


def look(n: int) -> dict[str, Any]:
    """Colour and marker of the n-th variant; the second round of colours is hollow."""
    turn = n // len(COLOURS)
    colour = COLOURS[n % len(COLOURS)]
    style = {"color": colour, "marker": MARKERS[(n + turn // 2) % len(MARKERS)], "markersize": 6}
    return {**style, "markerfacecolor": "white" if turn % 2 else colour}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def heat_map(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Share of needles found, depth against length, one panel per variant."""
    names = names_of(rows)
    lengths = sorted({r["length"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    columns = 2 if len(names) == 4 else min(len(names), 3)
    lines = -(-len(names) // columns)
    width, height = max(2.6, 0.72 * len(lengths) + 1.1), max(2.2, 0.36 * len(depths) + 1.2)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(
            lines, columns, figsize=(columns * width + 1.3, lines * height + 0.5), squeeze=False,
            sharex=True, sharey=True,
        )  # fmt: skip
        axes = list(grid.flat)
        for axis, name in zip(axes, names, strict=False):
            _heat_panel(axis, [r for r in rows if r["variant"] == name], lengths, depths)
            axis.set_title(_wrap(name), fontsize=10)
        for n, axis in enumerate(axes):
            axis.set_visible(n < len(names))
            axis.tick_params(labelbottom=n + columns >= len(names))
        figure.supxlabel("prompt length (tokens)")
        figure.supylabel("needle depth (% of the haystack)")
        figure.suptitle(title)
        bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.9, pad=0.02, aspect=20 * max(1, lines / 1.5))
        bar.set_label("needles found")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
        return save(figure, path)


def _heat_panel(axis: Axes, rows: Sequence[Row], lengths: Sequence[int], depths: Sequence[float]) -> None:
    score = {(r["depth"], r["length"]): r["score"] for r in rows}
    table = [[score.get((d, n), float("nan")) for n in lengths] for d in depths]
    axis.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for n in range(1, len(lengths)):
        axis.axvline(n - 0.5, color="white", linewidth=1)
    for n in range(1, len(depths)):
        axis.axhline(n - 0.5, color="white", linewidth=1)
    axis.set_xticks(range(len(lengths)), [tokens(n) for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            if value == value:
                axis.text(
                    x, y, f"{value:.0%}", ha="center", va="center", fontsize=8,
                    color="black" if value > 0.55 else "white",
                )  # fmt: skip


def _wrap(name: str, width: int = 26) -> str:
    out, line = [], ""
    for part in name.replace(",", ", ").replace("+", " +").split(" "):
        if line and len(line) + len(part) >= width:
            out.append(line)
            line = part
        else:
            line = f"{line} {part}" if line else part
    return "\n".join([*out, line])


def length_axis(axis: Axes, lengths: Sequence[int]) -> None:
    """Prompt lengths in tokens, on a logarithmic axis."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))
    axis.set_xlabel("prompt length (tokens)")


def _plain_ticks(axis: Axes) -> None:
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def bars(values: Sequence[tuple[str, float]], axis: Axes, form: str) -> None:
    """One horizontal bar per variant, the first on top, with its figure in the format `form`."""
    axis.barh(range(len(values)), [v for _, v in values], color=COLOURS[1], height=0.7)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for y, (_, value) in enumerate(values):
        axis.annotate(
            f"{value:{form}}", (value, y), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box
        )
    axis.set_yticks(range(len(values)), [_wrap(name) for name, _ in values])
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def _speed_bars(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Speed relative to dense at the longest prompt: what stays readable with many variants."""
    longest = max(r["length"] for r in rows)
    own = [r for r in rows if r["length"] == longest and r["variant"] != rows[0]["variant"]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 0.28 * len(own) + 1.7), sharey=True)
        for axis, key, what in zip(axes, ("ttft", "tpot"), ("to the first token", "per further token"), strict=True):
            axis.axvline(1, color="black", linewidth=1, zorder=0.9)
            bars([(r["variant"], r[f"{key}_speedup"]) for r in own], axis, ".2f")
            axis.set_xlim(0, 1.15 * max([1.0, *(r[f"{key}_speedup"] for r in own)]))
            axis.set_title(what, fontsize=10)
        figure.supxlabel("speed relative to dense (above 1: faster)", fontsize=10)
        figure.suptitle(f"{title}, prompts of {tokens(longest)} tokens")
        return save(figure, path)


def latency(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Time to the first token, per further token, and both relative to dense; bars show the spread."""
    names, lengths = names_of(rows), sorted({r["length"] for r in rows})
    if len(names) > len(COLOURS):
        return _speed_bars(rows, path, title)
    panels = (("ttft", 1, "time to first token (s)"), ("tpot", 1000, "time per further token (ms)"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.1))
        for n, name in enumerate(names):
            own = sorted((r for r in rows if r["variant"] == name), key=lambda r: r["length"])
            x = [r["length"] for r in own]
            for axis, (key, unit, _) in zip(axes, panels, strict=False):
                y = [r[key]["median"] * unit for r in own]
                low = [(r[key]["median"] - r[key]["low"]) * unit for r in own]
                high = [(r[key]["high"] - r[key]["median"]) * unit for r in own]
                axis.errorbar(x, y, yerr=[low, high], capsize=3, label=name, **look(n))
            if n:
                axes[2].plot(x, [r["ttft_speedup"] for r in own], **look(n))
                axes[2].plot(x, [r["tpot_speedup"] for r in own], linestyle="--", **look(n))
        for axis, (_, _, label) in zip(axes, panels, strict=False):
            axis.set_yscale("log")
            axis.set_ylabel(label)
        axes[2].axhline(1, color="black", linewidth=1)
        axes[2].set_ylabel("speed relative to dense (above 1: faster)")
        axes[2].plot([], [], color="grey", label="to first token")
        axes[2].plot([], [], color="grey", linestyle="--", label="per further token")
        axes[2].legend(loc="best", fontsize=9)
        for axis in axes:
            length_axis(axis, lengths)
            _plain_ticks(axis)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 4))
        figure.suptitle(title)
        return save(figure, path)


def memory(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Peak memory above the loaded model by length, of prefill and of decoding."""
    names, lengths = names_of(rows), sorted({r["length"] for r in rows})
    panels = (("peak_prefill", "peak in prefill"), ("peak_decode", "peak in decoding"))
    unit, unit_name = (GIB, "GiB") if max(r["peak"] for r in rows) > GIB else (2**20, "MiB")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
        for axis, (key, label) in zip(axes, panels, strict=True):
            for n, name in enumerate(names):
                own = sorted((r for r in rows if r["variant"] == name), key=lambda r: r["length"])
                axis.plot([r["length"] for r in own], [r[key] / unit for r in own], label=name, **look(n))
            axis.set_title(label, fontsize=10)
            axis.set_ylim(bottom=0)
            length_axis(axis, lengths)
        axes[0].set_ylabel(f"above the loaded model ({unit_name})")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 4))
        figure.suptitle(title)
        return save(figure, path)
