"""`hfpatch check` and `hfpatch inspect`: what patching would do to each attention layer, and what one then sees."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hfpatch.evals.run.models import load_model
from hfpatch.evals.run.variants import Variant, make_variant

from ..api import PatchPlan, plan_patch
from ..config.method_config import MethodConfig
from ..config.registry import list_methods
from ..errors import ConfigError, HfpatchError
from ..runtime.survey import Survey, survey
from .console import console


def show_check(name: str, model: Any, variants: Sequence[Variant]) -> None:
    """Print a line per attention layer; without patches, a line per method. Raises first when a patch is refused."""
    refusals = [sentence for v in variants if (sentence := _refusal(name, model, v))]
    if refusals:
        raise HfpatchError(" ".join(refusals))
    found = survey(model)
    kinds = Counter(layer.kind for layer in found.layers)
    console.print(
        f"{type(model).__name__}: {len(found.layers)} of {found.num_layers} decoder layers have softmax attention "
        f"({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
    )
    if variants:
        _layer_table(model, found, variants)
    else:
        _method_table(model)
    for module, why in found.skipped:
        console.print(f"left alone: {module} ({why})", style="dim")


def _methods(variant: Variant) -> list[MethodConfig]:
    return list(variant.config.methods) if variant.config else []


def _layer_table(model: Any, found: Survey, variants: Sequence[Variant]) -> None:
    table = Table("layer", "module", "kind", header_style="bold")
    for v in variants:
        table.add_column(Text(v.name))
    plans = [plan_patch(model, _methods(v)) for v in variants]
    for n, layer in enumerate(found.layers):
        shown = [_shown(plan, n) for plan in plans]
        table.add_row(str(layer.index), layer.name, layer.kind, *shown)
    console.print(table)
    for plan, variant in zip(plans, variants, strict=True):
        console.print(f"{variant.name}: patches {len(plan.patched)} of {found.num_layers} layers")


def _shown(plan: PatchPlan, n: int) -> Text:
    what = plan[n][1]
    return Text(what) if plan.chosen[n] else Text(f"- {what}", style="dim")


def _method_table(model: Any) -> None:
    table = Table("method", "patches", "leaves alone", header_style="bold")
    for name in list_methods():
        variant = make_variant(name, [(name, {})])
        plan = plan_patch(model, _methods(variant))
        left = Counter(why for why, some in zip(plan.why, plan.chosen, strict=True) if not some)
        table.add_row(name, f"{len(plan.patched)} layers", ", ".join(f"{n} ({why})" for why, n in left.items()))
    console.print(table)


def _refusal(name: str, model: Any, variant: Variant) -> str | None:
    """Why the patch as a whole is refused; weights are loaded only if the method has to look at them."""
    if variant.config is None:
        return None
    try:
        try:
            plan_patch(model, variant.config).prepare()
        except (NotImplementedError, RuntimeError):  # it reads weights, which the meta device has not got
            plan_patch(load_model(name).model, variant.config).prepare()
    except HfpatchError as error:
        return str(error)
    return None


def show_layer(
    loaded: Any, variant: Variant, layer: int | None, head: int, length: int, text: Path | None, out: Path
) -> None:
    """Draw what a patch lets one layer see of one prompt; print the figures beside it."""
    from hfpatch.evals.run.models import check_length

    from ..draw import draw_layer

    if variant.config is None or len(_methods(variant)) == 0:
        raise ConfigError("Name one patch to look at: --patch dhsa.")
    ids = prompt_ids(loaded, length, text)
    check_length(loaded, ids.shape[1])
    if layer is None:
        plan = plan_patch(loaded.model, _methods(variant))
        layer = next((taken.index for taken, _ in plan.patched), 0)
    file = out / f"layer-{layer}-head-{head}.png"
    seen = draw_layer(loaded.model, ids, variant.config, layer, file, head)
    chunks = (
        "" if seen.starts is None else f", {len(seen.starts)} chunks of {seen.length / len(seen.starts):.1f} tokens"
    )
    console.print(
        f"{variant.name}, layer {layer}: {seen.density:.1%} of the keys dense causal attention sees over "
        f"{seen.length:,} tokens{chunks}; written to {file}"
    )


def prompt_ids(loaded: Any, length: int, text: Path | None) -> Any:
    """Token ids `[1, L]` of the shipped prose, or of a text file, cut to `length`. Raises ConfigError."""
    from hfpatch.evals.run.generation import text_ids

    if text is None:
        return text_ids(loaded, length)
    ids = loaded.tokenizer(_read_text(text), return_tensors="pt")["input_ids"][:, :length].to(loaded.device)
    if ids.shape[1] < 2:
        raise ConfigError(f"{text} holds {ids.shape[1]} tokens; nothing can be drawn or audited of so few.")
    return ids


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"The text {str(path)!r:.200} cannot be read ({reason}).") from error
