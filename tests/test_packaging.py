"""The wheel has to hold every package of the source tree; `.ci/run` builds and runs it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from hfpatch.moved import MOVED

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for package, folder in setuptools["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inner]))
    assert found == set(setuptools["packages"])


@pytest.mark.parametrize("old", MOVED)
def test_modules_are_found_under_their_old_names(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        sys.modules.pop(old, None)
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old]) and module.__spec__.name == module.__name__ == MOVED[old]


def test_a_moved_module_is_there_once_whichever_name_comes_first() -> None:
    code = (
        "from hfpatch.flux.router import Routers; from hfpatch.methods.flux.router import Routers as Same; "
        "from hfpatch import pipeline; import hfpatch.call, hfpatch.core.call; from hfpatch.evals import niah; "
        "print(Routers is Same, pipeline.LayerRuntime.__module__, hfpatch.call is hfpatch.core.call, niah.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "hfpatch.runtime.pipeline", "True", "hfpatch.evals.jobs.niah"]
