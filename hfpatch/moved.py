"""Modules of earlier versions under their old names: they lead to where they are now, with a DeprecationWarning."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# room: what came to it, as `old` or `old:new`
ROOMS = {
    "core": "call selection blocks method report regroup:reweight learned ops.row_mask",
    "config": "patch_config patch_store layers registry hub",
    "runtime": "pipeline padding cache_state cache_crop:cache_keep survey injection raw_call",
    "ops": "one_query:torch_decode",
    "files": "json_text output",
    "methods": "dhsa flux infiniretri",
    "calibrate.flux": "flux.examples flux.processes flux.ranking flux.training",
    "text": "evals.testbed.text:grammar evals.tasks.sources",
    "evals.run": "evals.cells evals.runner evals.shards evals.estimate evals.models evals.variants "
    "evals.generation evals.stats evals.patch_files evals.backends evals.correctness",
    "evals.jobs": "evals.bench:latency evals.memory evals.niah evals.task_job:task evals.reader_job:reader "
    "evals.lm_eval_job:lm_eval evals.perplexity_job:perplexity",
    "evals.recipe": "evals.recipe_run:build",
    "evals.report": "evals.results:read evals.page evals.page_template evals.plots evals.more_plots:plots "
    "evals.summary evals.tables evals.compare",
}


def _table() -> dict[str, str]:
    found = {}
    for room, modules in ROOMS.items():
        for old, _, new in (m.partition(":") for m in modules.split()):
            found[f"hfpatch.{old}"] = f"hfpatch.{room}.{new or old.rpartition('.')[2]}"
    return found


MOVED = _table()


def new_name(name: str) -> str | None:
    """Where a module is now; what lies in a folder goes with it. None if it has not moved."""
    if name in MOVED:
        return MOVED[name]
    folder, _, leaf = name.rpartition(".")
    above = new_name(folder) if folder else None
    return f"{above}.{leaf}" if above else None


class _Forward(Loader):
    """Gives the module that took the place of another, unchanged."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = new_name(spec.name)
        assert new is not None
        warnings.warn(f"{spec.name} is now {new}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = spec.loader_state


class Forwarding(MetaPathFinder):
    """Finds modules under their old names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec that leads to the module's new place; None for any other name."""
        return ModuleSpec(name, _Forward()) if new_name(name) else None


def install() -> None:
    """Have old names found, before others look at the folders."""
    if not any(isinstance(finder, Forwarding) for finder in sys.meta_path):
        sys.meta_path.insert(0, Forwarding())
