"""How far a model can count: a table of positions ends, computed positions do not."""

from typing import Any

from torch import nn

SPECIAL = 4  # rows of a table, or positions of the config, that some models keep for padding


def position_limit(model: Any) -> int | None:
    """Positions the config names, None where it names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def position_table(model: Any) -> int | None:
    """Tokens a model takes that looks positions up in a table, as GPT-2 does; None where it computes them."""
    limit = position_limit(model)
    if limit is None or not isinstance(model, nn.Module):
        return None
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _named(path):
            padding = -1 if module.padding_idx is None else module.padding_idx
            rows.append(module.num_embeddings - max(getattr(module, "offset", 0), padding + 1))
    rows += [table.shape[0] for path, table in model.named_buffers() if table.dim() == 2 and _named(path)]
    return min((n for n in rows if limit - SPECIAL <= n <= limit), default=None)


def _named(path: str) -> bool:
    name = path.rpartition(".")[2]
    return "pos" in name or name == "wpe"
