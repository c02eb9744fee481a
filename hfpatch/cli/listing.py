"""`hfpatch list`: methods, presets and settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ..config.registry import get_method, list_methods, list_presets, make_config
from ..core.method import Method
from .console import console

CAUSALITY = {
    "yes": "causal",
    "tile": "causal by block (a query block's choice of keys looks at the whole block)",
    "no": "not causal (later tokens can change earlier ones)",
}


def show_methods() -> None:
    """Print two lines per method and one per preset."""
    presets: dict[str, list[str]] = {}
    for preset, (name, settings) in list_presets().items():
        presets.setdefault(name, []).append(f"preset {preset}: {_settings_text(settings)}")
    grid = Table.grid(padding=(0, 2))
    for name in list_methods():
        cls = get_method(name)
        grid.add_row(Text(name, style="bold"), Text(cls.summary))
        for line in (_facts(cls), *presets.get(name, [])):
            grid.add_row("", Text(line, style="dim"))
    console.print(grid)


def show_method(name: str) -> None:
    """Print a method's or preset's facts and settings. Raises UnknownMethodError."""
    config = make_config(name, {})
    cls = get_method(config.method)
    console.print(Text(f"{config.method}: {cls.summary}", style="bold"))
    console.print(Text(_facts(cls)))
    table = Table("setting", "default" if name == config.method else name, "meaning", header_style="bold")
    for f in dataclasses.fields(config):
        table.add_row(f.name, Text(repr(getattr(config, f.name))), Text(_meaning(f.metadata)))
    console.print(table)


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items())


def _meaning(meta: Mapping[str, Any]) -> str:
    limits = [f"{sign} {meta[k]}" for k, sign in (("ge", ">="), ("gt", ">"), ("le", "<=")) if meta.get(k) is not None]
    if meta.get("choices"):
        limits.append("one of " + ", ".join(map(str, meta["choices"])))
    return meta.get("help", "") + (f" ({', '.join(limits)})" if limits else "")


def _facts(cls: type[Method]) -> str:
    method = cls(cls.config_class())
    what = "drops keys from the cache" if method.retain else "changes nothing"
    if cls.points():
        what = "acts in " + " and ".join(p for p in ("prefill", "decode") if p in method.acts_in)
    facts = [what, CAUSALITY[method.causality]]
    facts += [f"needs {need}" for need in sorted(cls.needs)]
    facts += ["needs training"] if cls.trained else []
    facts += [cls.paper.replace("https://arxiv.org/abs/", "arXiv ")] if cls.paper else []
    return "; ".join(facts)
