"""A picture of one layer: where its chunks begin and which keys every query sees."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttentionCall
from ..config import MethodConfig
from ..errors import ConfigError
from ..patch_config import PatchConfig
from ..selection import Layout, Selection

PIXELS = 900


@dataclass(frozen=True)
class Seen:
    """What one layer did with one prompt: chunk starts `[C]` and the kept map `[H, rows, columns]` in [0, 1]."""

    starts: Tensor
    kept: Tensor
    length: int


def kept_map(selection: Selection | None, at: Layout, pixels: int = PIXELS) -> Tensor:
    """Share of visible pairs per cell of a grid of at most `pixels` a side, `[H, rows, columns]`, of the first row.

    A few queries at a time, so that a long prompt's mask is never written out whole.
    """
    side = min(pixels, at.Lk)
    column = torch.arange(at.Lk, device=at.device) * side // at.Lk
    rows: dict[int, Tensor] = {}
    step = max(1, (1 << 22) // at.Lk)
    for start in range(0, at.Lq, step):
        stop = min(start + step, at.Lq)
        i, j = at.rows(start, stop).positions()
        mask = (j <= i)[None] if selection is None else _some(selection, at, start, stop)
        cells = torch.zeros(*mask.shape[:2], side, device=at.device)
        cells.index_add_(2, column[: mask.shape[2]], mask.float())
        for n in range(stop - start):
            row = (start + n) * side // at.Lq
            rows[row] = rows.get(row, 0) + cells[:, n]
    kept = torch.stack([rows[r] for r in sorted(rows)], 1)
    return kept / kept.amax().clamp_min(1)


def _some(selection: Selection, at: Layout, start: int, stop: int) -> Tensor:
    from ..ops.row_mask import row_mask

    return row_mask(selection, at, start, stop)[0]


def look(model: nn.Module, ids: Tensor, config: MethodConfig | PatchConfig, layer: int) -> Seen:
    """Run `ids [1, L]` under a `dhsa` patch and note what decoder layer `layer` did. Raises ConfigError."""
    from ..api import patched
    from ..methods.dhsa import KEY, Dhsa

    found: dict[str, Any] = {}

    def watch(call: AttentionCall, selection: Selection | None) -> None:
        if call.layer == layer and "kept" not in found:
            table = call.state.get(KEY)
            found["starts"] = torch.zeros(0) if table is None else table.spans[0][0]
            found["kept"] = kept_map(selection, call.layout)

    with patched(model, config) as patch, torch.no_grad():
        if layer not in patch.layers:
            raise ConfigError(f"Layer {layer} is not patched; choose one of {', '.join(map(str, patch.layers))}.")
        for method in patch.methods:
            if isinstance(method, Dhsa):
                method.watch = watch
        model(ids, use_cache=False)
    if not found:
        raise ConfigError("The patch holds no dhsa, or the layer ran dense; nothing to draw.")
    return Seen(found["starts"].cpu(), found["kept"].cpu(), ids.shape[1])


def draw_layer(
    model: nn.Module, ids: Tensor, config: MethodConfig | PatchConfig, layer: int, out: str | Path, head: int = 0
) -> Path:
    """Write a PNG of layer `layer` for the prompt `ids [1, L]`: kept keys of KV group `head`, chunk starts below.

    Needs matplotlib. Raises ConfigError.
    """
    from matplotlib.figure import Figure

    seen, out = look(model, ids, config, layer), Path(out)
    figure = Figure(figsize=(8, 8.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(12, 1), sharex=True)
    extent = (0, seen.length, seen.length, 0)
    top.imshow(seen.kept[min(head, len(seen.kept) - 1)], cmap="Greys", vmin=0, aspect="auto", extent=extent)
    density = float((seen.kept[0] > 0).float().mean())
    top.set_title(f"layer {layer}: keys every query sees ({density:.0%} of the cells touched)")
    top.set_ylabel("query")
    bottom.vlines(seen.starts.tolist(), 0, 1, linewidth=0.4, color="tab:blue")
    bottom.set(yticks=[], xlabel=f"key; {len(seen.starts)} chunks", xlim=(0, seen.length))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out
