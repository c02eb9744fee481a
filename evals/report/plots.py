"""PNG plots of views; colours are told apart by colour-blind readers, and markers repeat what colours say."""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..jobs.view import Bar, Bars, HeatMap, Lines, Panel, Plot, Series
from ..run.stats import tokens

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e4e4e4", "axes.axisbelow": True, "legend.frameon": False, "savefig.dpi": 140,
    "figure.constrained_layout.use": True,
}  # fmt: skip
PERCENT = FuncFormatter(lambda y, _: f"{y:.0%}")
BESIDE = 3  # groups of bars in a line
ASIDE = 0.02  # octaves of prompt length between the variants of a plot of shares, which often coincide


def draw(plot: Plot, path: Path, title: str) -> Path:
    """Write a plot as PNG; returns its path."""
    style = {**STYLE, "axes.grid": not isinstance(plot, HeatMap)}
    with plt.rc_context(style):
        figure = _figure(plot)
        figure.suptitle(f"{title}{plot.note}")
        return save(figure, path)


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


@singledispatch
def _figure(plot: Any) -> Figure:
    raise TypeError(f"{type(plot).__name__} is no plot")


@_figure.register
def _heat_map(plot: HeatMap) -> Figure:
    """Shares by depth and length, one panel per name."""
    names = list(plot.panels)
    places = {place for panel in plot.panels.values() for place in panel}
    lengths, depths = sorted({n for _, n in places}), sorted({d for d, _ in places})
    columns = 2 if len(names) == 4 else min(len(names), 3)
    lines = -(-len(names) // columns)
    width, height = max(2.6, 0.72 * len(lengths) + 1.1), max(2.2, 0.36 * len(depths) + 1.2)
    figure, grid = plt.subplots(
        lines, columns, figsize=(columns * width + 1.3, lines * height + 0.5), squeeze=False, sharex=True, sharey=True
    )
    axes = list(grid.flat)
    for axis, name in zip(axes, names, strict=False):
        _heat_panel(axis, plot.panels[name], lengths, depths)
        axis.set_title(_wrap(name), fontsize=10)
    for n, axis in enumerate(axes):
        axis.set_visible(n < len(names))
        axis.tick_params(labelbottom=n + columns >= len(names))
    figure.supxlabel(plot.x_label)
    figure.supylabel(plot.y_label)
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.9, pad=0.02, aspect=20 * max(1, lines / 1.5))
    bar.set_label(plot.label)
    bar.ax.yaxis.set_major_formatter(PERCENT)
    return figure


def _heat_panel(
    axis: Axes, shares: Mapping[tuple[float, int], float], lengths: Sequence[int], depths: Sequence[float]
) -> None:
    table = [[shares.get((d, n), float("nan")) for n in lengths] for d in depths]
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


@_figure.register
def _lines(plot: Lines) -> Figure:
    """Panels side by side, one legend below; a name has one colour in all of them."""
    names = list(dict.fromkeys(s.name for panel in plot.panels for s in panel.series))
    looks = {name: look(n) for n, name in enumerate(names)}
    size = {1: (7.5, 4.2), 2: (9, 4.1)}.get(len(plot.panels), (4.17 * len(plot.panels), 4.1))
    figure, grid = plt.subplots(1, len(plot.panels), figsize=size, squeeze=False)
    for axis, panel in zip(grid.flat, plot.panels, strict=True):
        for series in panel.series:
            aside = names.index(series.name) - (len(names) - 1) / 2 if panel.percent and plot.lengths else 0
            _line(axis, series, looks[series.name], [x * 2 ** (ASIDE * aside) for x in series.x])
        _dress(axis, panel)
        if plot.lengths:
            _length_axis(axis, sorted({x for s in panel.series for x in s.x}))
        else:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(plot.x_label)
    columns = min(len(names), 3 if len(plot.panels) == 1 else 4)
    shown: dict[str, Any] = {}
    for axis in grid.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(name, handle)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns)
    return figure


def _line(axis: Axes, series: Series, style: dict[str, Any], at: Sequence[float]) -> None:
    style = {**style, "linestyle": "--" if series.dashed else "-", "label": series.name}
    if not len(series.low):
        axis.plot(at, series.y, **style)
        return
    down = [y - low for y, low in zip(series.y, series.low, strict=True)]
    up = [high - y for y, high in zip(series.y, series.high, strict=True)]
    axis.errorbar(at, series.y, yerr=[down, up], capsize=3, elinewidth=1, clip_on=False, **style)


def _dress(axis: Axes, panel: Panel) -> None:
    axis.set_ylabel(panel.label)
    axis.set_title(panel.title, fontsize=10)
    if panel.percent:
        axis.set_ylim(-0.03, 1.05)
        axis.yaxis.set_major_formatter(PERCENT)
    else:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    if panel.baseline is not None:
        axis.axhline(panel.baseline, color="black", linewidth=1)
    if panel.styles:
        handles = [axis.plot([], [], color="grey", linestyle=line)[0] for line in ("-", "--")]
        axis.legend(handles, panel.styles, loc="best", fontsize=9)


def _length_axis(axis: Axes, lengths: Sequence[float]) -> None:
    """Prompt lengths in tokens, on a logarithmic axis."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))


@_figure.register
def _bars(plot: Bars) -> Figure:
    """Groups of horizontal bars, the first on top, up to three beside each other."""
    columns = min(len(plot.groups), BESIDE)
    lines = -(-len(plot.groups) // columns)
    tallest = max(len(bars) for bars in plot.groups.values())
    width = {1: 7.5, 2: 9.5}.get(columns, 12.5)
    height = lines * (0.28 * tallest + 0.7) + 0.9
    figure, grid = plt.subplots(lines, columns, figsize=(width, height), squeeze=False)
    for n, axis in enumerate(grid.flat):
        axis.set_visible(n < len(plot.groups))
    for n, (axis, (title, bars)) in enumerate(zip(grid.flat, plot.groups.items(), strict=False)):
        _bar_panel(axis, bars, plot, names=n % columns == 0)
        axis.set_title(title, fontsize=10)
    figure.supxlabel(plot.label, fontsize=10)
    return figure


def _bar_panel(axis: Axes, bars: Sequence[Bar], plot: Bars, *, names: bool) -> None:
    axis.barh(range(len(bars)), [b.value for b in bars], color=COLOURS[1], height=0.7)
    if plot.baseline is not None:
        axis.axvline(plot.baseline, color="black", linewidth=1, zorder=0.9)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for y, bar in enumerate(bars):
        end = bar.value
        if bar.low is not None and bar.high is not None:
            error = [[bar.value - bar.low], [bar.high - bar.value]]
            axis.errorbar(bar.value, y, xerr=error, color="black", capsize=3, elinewidth=1)
            end = bar.high
        text = f"{bar.value:{plot.form}}"
        axis.annotate(text, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
    ends = [v for b in bars for v in (b.value, b.high) if v is not None]
    axis.set_xlim(0, 1.15 * max([1.0, *ends]))
    axis.set_yticks(range(len(bars)), [_wrap(b.name) if names else "" for b in bars])
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    if plot.form.endswith("%"):
        axis.xaxis.set_major_formatter(PERCENT)


Points = Mapping[str, tuple[float, float]]


def accuracy_density(scores: Points, nlls: Points, path: Path, title: str) -> Path:
    """Mean score, and answer NLL where measured, against the share of keys attended to; a method's settings joined.

    Points are `variant -> (value, density)`.
    """
    measures = [("score (mean over the tasks)", scores), ("answer NLL (lower is better)", nlls)]
    measures = [(label, points) for label, points in measures if points]
    width, beside = (7.5, 4) if len(measures) == 1 else (11.5, 6)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(measures), figsize=(width, 4.6), squeeze=False)
        for axis, (label, points) in zip(axes.flat, measures, strict=True):
            _density_panel(axis, points, label, list(dict.fromkeys(v.split(":")[0] for v in scores)))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), beside))
        figure.suptitle(title)
        return save(figure, path)


def _density_panel(axis: Axes, points: Points, label: str, families: Sequence[str]) -> None:
    own: dict[str, list[tuple[float, float]]] = {}
    for variant, (value, density) in points.items():
        own.setdefault(variant.split(":")[0], []).append((density, value))
    for n, family in enumerate(families):
        if family in own:
            x, y = zip(*sorted(own[family]), strict=True)
            line = {"linestyle": "-" if len(x) > 1 else "none", "label": family, "clip_on": False}
            axis.plot(x, y, **{**look(n), "markersize": 8, **line})
    share = label.startswith("score")
    axis.set_xlabel("keys attended to (mean over the tasks)")
    axis.set_ylabel(label)
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1.05 if share else None)
    axis.xaxis.set_major_formatter(PERCENT)
    if share:
        axis.yaxis.set_major_formatter(PERCENT)
