"""Pictures: which keys every query of a layer sees, where DHSA's chunks begin, and the mass that audits found kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config.method_config import MethodConfig
from .config.patch_config import PatchConfig
from .core.audit_report import AuditReport
from .core.call import AttentionCall
from .core.row_mask import row_mask
from .core.selection import Layout, Selection, intersect
from .errors import ConfigError

PIXELS = 900
PHASES = ("prefill", "chunk", "decode")


@dataclass(frozen=True)
class Seen:
    """What one layer did with one prompt: kept map `[H, rows, columns]` in [0, 1], share of visible pairs kept,
    chunk starts `[C]` (None without chunks), tokens."""

    kept: Tensor
    density: float
    starts: Tensor | None
    length: int


def kept_map(selection: Selection | None, at: Layout, pixels: int = PIXELS) -> Tensor:
    """Share of pairs kept per cell of a grid of at most `pixels` a side, `[H, rows, columns]`, of the first row.

    A few queries at a time, so that a long prompt's mask is never written out whole.
    """
    side = min(pixels, at.Lk)
    column = torch.arange(at.Lk, device=at.device) * side // at.Lk
    rows: dict[int, Tensor] = {}
    step = max(1, (1 << 22) // at.Lk)
    for start in range(0, at.Lq, step):
        stop = min(start + step, at.Lq)
        i, j = at.rows(start, stop).positions()
        mask = (j <= i)[None] if selection is None else row_mask(selection, at, start, stop)[0]
        cells = torch.zeros(*mask.shape[:2], side, device=at.device)
        cells.index_add_(2, column[: mask.shape[2]], mask.float())
        for n in range(stop - start):
            row = (start + n) * side // at.Lq
            rows[row] = rows.get(row, 0) + cells[:, n]
    kept = torch.stack([rows[r] for r in sorted(rows)], 1)
    height = (torch.arange(at.Lq, device=at.device) * side // at.Lq).bincount()
    return kept / (height[height > 0][:, None] * column.bincount())


def look(model: nn.Module, ids: Tensor, config: MethodConfig | PatchConfig, layer: int) -> Seen:
    """Run `ids [1, L]` under a patch and note what decoder layer `layer` did. Raises ConfigError."""
    from .api import patched
    from .methods.dhsa.table import ChunkTable

    calls: list[AttentionCall] = []
    chosen: list[Selection | None] = []

    def watched(select: Any) -> Any:
        def select_and_note(call: AttentionCall) -> Selection | None:
            selection: Selection | None = select(call)
            if call.layer == layer:
                calls.append(call)
                chosen.append(selection)
            return selection

        return select_and_note

    with patched(model, config) as patch, torch.no_grad():
        if layer not in patch.layers:
            raise ConfigError(f"Layer {layer} is not patched; choose one of {', '.join(map(str, patch.layers))}.")
        for method in patch.methods:
            if "select" in method.points():
                method.select = watched(method.select)  # type: ignore[method-assign]
        model(ids, use_cache=False)
    if not calls:
        dropping = next((m.name for m in patch.methods if m.retain is not None), None)
        more = f" What {dropping} keeps in the cache, report() says after a call with one." if dropping else ""
        raise ConfigError(f"Layer {layer} chose no keys in prefill; nothing to draw.{more}")
    selection: Selection | None = None
    for one in chosen:
        selection = intersect(selection, one)
    at = calls[0].layout
    tables = [v for call in calls for v in call.state.values() if isinstance(v, ChunkTable)]
    starts = tables[0].spans[0][0].cpu() if tables else None
    kept = at.visible if selection is None else int(selection.attended(at))
    return Seen(kept_map(selection, at).cpu(), kept / at.visible, starts, ids.shape[1])


def draw_layer(
    model: nn.Module, ids: Tensor, config: MethodConfig | PatchConfig, layer: int, out: str | Path, head: int = 0
) -> Seen:
    """Write a PNG of layer `layer` for the prompt `ids [1, L]`: keys kept by KV group or head `head`, chunks below.

    Needs matplotlib. Raises ConfigError.
    """
    from matplotlib.figure import Figure

    seen, out = look(model, ids, config, layer), Path(out)
    heads = len(seen.kept)
    if head < 0 or head >= heads > 1:
        raise ConfigError(f"There is no head {head}; this layer chose for {heads}, counted from 0.")
    heights = (12,) if seen.starts is None else (12, 1)
    figure = Figure(figsize=(8, 7 + 0.8 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, sharex=True, squeeze=False)
    top, bottom = axes[0, 0], axes[-1, 0]
    extent = (0, seen.length, seen.length, 0)
    top.imshow(
        seen.kept[min(head, heads - 1)].numpy(),
        cmap="Greys",
        vmin=0,
        aspect="auto",
        extent=extent,
        interpolation="nearest",
    )
    shared = "" if heads == 1 else f", head {head} of {heads}"
    top.set_title(f"layer {layer}{shared}: the keys every query sees, {seen.density:.1%} of the causal ones")
    top.set_ylabel("query")
    bottom.set_xlabel("key")
    if seen.starts is not None:
        bottom.vlines(seen.starts.tolist(), 0, 1, linewidth=0.4, color="tab:blue")
        bottom.set(yticks=[], xlabel=f"key; {len(seen.starts)} chunks", xlim=(0, seen.length))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return seen


def draw_masses(reports: Mapping[str, AuditReport], out: str | Path) -> None:
    """Write a PNG of layers x heads for every patch and phase audited, coloured by the mean mass kept.

    Needs matplotlib. Raises ConfigError where no report has a sparse call.
    """
    from matplotlib.figure import Figure

    tables = mass_tables(reports)
    if not tables:
        raise ConfigError("No sparse call has been audited; nothing to draw.")
    layers, heads = next(iter(tables.values())).shape
    columns = len(tables) // len(reports)
    least = min(float(t.nan_to_num(1.0).min()) for t in tables.values())
    size = max(3.0, 0.3 * heads + 1) * columns + 1.2, max(2.2, 0.14 * layers + 1) * len(reports) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(reports), columns, squeeze=False, sharex=True, sharey=True)
    for place, ((name, phase), table) in zip(axes.flat, tables.items(), strict=True):
        place.set_title(f"{name}\n{phase}", fontsize=9, wrap=True)
        shown = place.imshow(
            table.numpy(), cmap="viridis", vmin=min(least, 0.999), vmax=1, aspect="auto", interpolation="nearest",
            origin="lower",
        )  # fmt: skip
        place.set_facecolor("#e4e4e4")
        if bool(table.isnan().all()):
            place.text(0.5, 0.5, "no sparse call", transform=place.transAxes, ha="center", va="center")
        for axis in (place.xaxis, place.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.supxlabel("query head", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    figure.colorbar(shown, ax=axes, label="mean attention mass kept (grey: not audited)", shrink=0.8)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)


def mass_tables(reports: Mapping[str, AuditReport]) -> dict[tuple[str, str], Tensor]:
    """Mean mass kept `[layers, Hq]` of every patch in every phase some patch was audited in; nan where it was not."""
    lines = [line for report in reports.values() for line in report.lines]
    layers, heads = max((x.layer + 1 for x in lines), default=0), max((len(x.heads) for x in lines), default=0)
    tables = {}
    for name, report in reports.items():
        for phase in (p for p in PHASES if any(x.phase == p for x in lines)):
            tables[name, phase] = table = torch.full((layers, heads), torch.nan)
            for line in (x for x in report.lines if x.phase == phase):
                table[line.layer, : len(line.heads)] = torch.tensor(line.heads)
    return tables
