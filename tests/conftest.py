"""Seeds every test and fills uninitialised memory with NaN, so that a buffer nobody wrote is seen."""

import os
import signal
import threading
import zlib
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported; without a GPU nothing else uses it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, and so in subprocesses


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--third`: the invariants on every third model, for releases of Transformers beside the pinned one."""
    parser.addoption("--third", action="store_true", help="run the invariants on every third model of the zoo only")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a `thin(n)` test one case in n stays, the others are slow; --third leaves out two thirds of the models."""
    seen = set[str]()
    for item in items:
        if (thin := item.get_closest_marker("thin")) is not None:
            name = item.nodeid.partition("[")[0]
            if name in seen and zlib.crc32(item.nodeid.encode()) % thin.args[0]:  # every argument has its turn
                item.add_marker(pytest.mark.slow)
            seen.add(name)
    if not config.getoption("--third"):
        return
    import zoo

    chosen = {*list(zoo.SUPPORTED)[::3], *zoo.REFUSED}
    left = [item for item in items if item.path.name == "test_invariants.py" and _model(item) not in (None, *chosen)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


def _model(item: pytest.Item) -> str | None:
    params = getattr(item, "callspec", None)
    return None if params is None or "tiny" not in params.params else params.params["tiny"].name


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(42)
    torch.set_num_threads(1)
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poisoned(make):
        def build(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

        return build

    torch.empty, torch.Tensor.new_empty, torch.empty_like = map(poisoned, (empty, new_empty, empty_like))
    yield
    torch.empty, torch.Tensor.new_empty, torch.empty_like = empty, new_empty, empty_like
