"""From a recipe's data to the run it describes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hfpatch import PatchConfig, get_method, list_methods
from hfpatch.config.old_names import unwarned
from hfpatch.errors import HfpatchError
from hfpatch.files.located import Located, Where

from ..jobs.base import Job
from ..jobs.registry import GROUPS, named
from ..run.models import load_skeleton
from ..run.patch_files import checked_config
from ..run.runner import Run
from ..run.variants import DENSE, THROUGH, Variant, make_variant, parse_variants


def build_run(found: Located) -> Run:
    """The run a checked recipe describes. Raises FileError, HfpatchError."""
    data = found.data
    notes: list[str] = []
    variants = all_variants(found, notes) if data["variants"] == "all" else _variants(found)
    return Run(
        title=data.get("title", "recipe"),
        model=data["model"],
        variants=variants,
        jobs=_jobs(found),
        dtype=data.get("dtype", "auto"),
        device=data.get("device"),
        seed=data.get("seed", 0),
        about=data.get("about", ""),
        notes=notes,
    )


def all_variants(found: Located, notes: list[str]) -> list[Variant]:
    """Dense and every method that needs no training, with the recipe's settings for it; the rest goes to `notes`."""
    model = load_skeleton(found.data["model"])
    variants = [Variant(DENSE)]
    settings = found.data.get("settings", {})
    with unwarned():
        for name, own in settings.items():
            checked_config(found, ("settings", name), ("settings", name), name, own)
    for name in list_methods():
        if get_method(name).trained:
            notes.append(f"{name} is left out: it needs training.")
            continue
        variant = make_variant(THROUGH if name == DENSE else name, [(name, settings.get(name, {}))])
        try:
            with variant.applied(model):
                pass
        except HfpatchError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        except (NotImplementedError, RuntimeError):
            pass  # it reads weights, which the skeleton on the meta device has not got; the run itself will tell
        variants.append(variant)
    return variants


def _variants(found: Located) -> list[Variant]:
    variants = [Variant(DENSE)]
    for n, entry in enumerate(found.data["variants"]):
        where: Where = ("variants", n)
        made = _from_methods(found, where, entry) if "methods" in entry else _from_patch(found, where, entry)
        if made.name in {v.name for v in variants}:
            raise found.error((*where, "name"), f"the variant {made.name!r:.99} is there twice; give each a 'name'.")
        variants.append(made)
    return variants


def _from_methods(found: Located, where: Where, entry: dict[str, Any]) -> Variant:
    configs = []
    for n, method in enumerate(entry["methods"]):
        settings = {k: v for k, v in method.items() if k != "method"}
        at = (*where, "methods", n)
        configs.append(checked_config(found, (*at, "method"), at, method["method"], settings))
    name = entry.get("name") or "+".join(m["method"] for m in entry["methods"])
    return Variant(name, PatchConfig(configs))


def _from_patch(found: Located, where: Where, entry: dict[str, Any]) -> Variant:
    settings = entry.get("settings", {})
    plain = entry["patch"].replace("_", "").replace("-", "").isalnum()
    if plain:
        with unwarned():
            checked_config(found, (*where, "patch"), (*where, "settings"), entry["patch"], settings)
    try:
        made = parse_variants([entry["patch"]], settings)[1]
    except HfpatchError as error:
        if str(error).startswith(found.file):
            raise
        raise found.error((*where, "patch"), str(error)) from error
    return dataclasses.replace(made, name=entry.get("name", made.name))


def _jobs(found: Located) -> Sequence[Job]:
    jobs: list[Job] = []
    labels: set[str] = set()
    for group in GROUPS:
        for n, entry in enumerate(found.data.get(f"{group}s") or []):
            job = _job(found, (f"{group}s", n), dict(entry), group)
            if job.label in labels:
                raise found.error((f"{group}s", n), f"two jobs are called {job.label!r}; give one of them a 'label'.")
            labels.add(job.label)
            jobs.append(job)
    return jobs


def _job(found: Located, where: Where, entry: dict[str, Any], group: str) -> Job:
    name = entry.pop(group)
    kind = named(group, name)
    if kind is None:
        raise found.error((*where, group), f"there is no {group} called {name!r:.200}.")
    job = kind.from_recipe(name, entry)
    if wrong := job.problem():
        place, sentence = wrong
        raise found.error((*where, *place), sentence)
    return job
