"""The handle of a patched model: what it carries, what it did, what it misses."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config.patch_config import PatchConfig
from .core.audit import Audit
from .core.call import Span
from .core.report import LayerLine, Report
from .drives import Drives
from .errors import ConfigError
from .runtime.cropping import kept_notes
from .runtime.pipeline import LayerRuntime
from .runtime.planning import PatchPlan
from .runtime.survey import AttentionLayer
from .values import shown


class Handle(Drives):
    """Report, spans, audit, config and saving of a patch; with `infiniretri`, reading as well."""

    def __init__(self, plan: PatchPlan, layers: list[tuple[AttentionLayer, LayerRuntime]]) -> None:
        self._model, self.plan, self.methods = plan.model, plan, plan.methods
        self._plan = layers
        self._warnings: list[str] = []

    @property
    def config(self) -> PatchConfig:
        """What was patched, with the tensors the methods have learned."""
        own = self.plan.config
        tensors = {f"{n}.{k}": t for n, m in enumerate(self.methods) for k, t in m.tensors().items()}
        return PatchConfig(own.methods, own.base_model_name_or_path, tensors)

    @property
    def layers(self) -> list[int]:
        """Decoder layers that carry the patch."""
        return [layer.index for layer, _ in self._plan]

    def report(self) -> Report:
        """Calls, density, executors and fallbacks per layer and phase so far."""
        lines = [
            LayerLine(layer.index, layer.name, "+".join(m.name for m in rt.methods), phase, stats)
            for layer, rt in self._plan
            for phase, stats in sorted(rt.stats.items())
        ]
        seen = sum((rt.notes for _, rt in self._plan), Counter[str]())
        notes = [note for m in self.methods for note in m.notes()]
        notes += kept_notes((layer.index, rt.cropping) for layer, rt in self._plan)
        notes += [f"{what} ({n} calls)" for what, n in seen.items()] + self._warnings
        if any(rt.in_graph for _, rt in self._plan):
            notes.append("steps that torch.compile has put into one graph are not counted")
        dense = Counter(rt.dense_in_graph for _, rt in self._plan if rt.dense_in_graph)
        notes += [f"in such a graph {n} layers run dense: {reason}" for reason, n in dense.items()]
        layers = self.plan.survey.num_layers
        return Report(type(self._model).__name__, layers, len(self._plan), lines, self.plan.skipped, notes)

    def reset_report(self) -> None:
        """Set all counts to zero."""
        for _, runtime in self._plan:
            runtime.stats.clear()
            runtime.notes.clear()
            runtime.cropping.held = None

    @contextmanager
    def spans(self, **places: Sequence[Span]) -> Iterator[None]:
        """Tell the methods where parts of the prompts lie: `with patch.spans(question=[(1900, 1950), None]): ...`.

        One `(start, stop)` per batch row, in tokens of the row without its padding, or None where a row has no such
        part. `dhsa` attends densely from the start of "question" on. Raises ConfigError.
        """
        for name, rows in places.items():
            listed = isinstance(rows, (list, tuple)) and len(rows) > 0
            if not listed or not all(p is None or _is_span(p) for p in rows):
                raise ConfigError(f"spans: {name} takes one (start, stop) per row, with 0 <= start < stop, or None.")
        before = [runtime.spans for _, runtime in self._plan]
        for _, runtime in self._plan:
            runtime.spans = {**runtime.spans, **places}
        try:
            yield
        finally:
            for (_, runtime), old in zip(self._plan, before, strict=True):
                runtime.spans = old

    @contextmanager
    def audit(self, rows: int = 16, *, tiles: int = 1, seed: int = 0) -> Iterator[Audit]:
        """See what the patch misses of the calls inside the block: `print(audit.report())`.

        `rows` random queries of every sparse call are worked out densely too, and `tiles` tiles of queries for the
        oracle, which would keep as many key blocks by their true mass; both cost that many more rows of dense
        attention. Only sums are kept. Raises ConfigError.
        """
        for name, value, least in (("rows", rows, 1), ("tiles", tiles, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"audit: {name}={shown(value)} must be a whole number of {name}, {least} or more.")
        audit = Audit(rows, tiles, seed)
        before = [runtime.audit for _, runtime in self._plan]
        for _, runtime in self._plan:
            runtime.audit = audit
        try:
            yield audit
        finally:
            audit.in_graph = any(runtime.in_graph for _, runtime in self._plan)
            for (_, runtime), old in zip(self._plan, before, strict=True):
                runtime.audit = old

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the config and learned tensors into `folder`."""
        self.config.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the config and learned tensors to the Hub; returns the repository's address."""
        return self.config.push_to_hub(repo_id, **kwargs)

    def __repr__(self) -> str:
        names = ", ".join(m.name for m in self.methods)
        return f"Patch({names}; {len(self._plan)} of {self.plan.survey.num_layers} layers)"


def _is_span(place: Any) -> bool:
    pair = isinstance(place, (list, tuple)) and len(place) == 2
    return pair and all(isinstance(n, int) and not isinstance(n, bool) for n in place) and 0 <= place[0] < place[1]
