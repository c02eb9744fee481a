"""Patching and unpatching are whole or not at all: errors, Ctrl-C at any line, threads at once."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import zoo
from handle_helpers import SHARED, STREAMING, carrying, fresh
from test_invariants import tree

import hfpatch
import hfpatch.api as api
from hfpatch import AlreadyPatchedError, NotPatchedError, get_patch, patch_model, patched, unpatch_model


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[BaseException]], None]:
    """Makes the n-th attaching of a layer fail, before or after it was done."""

    def plan(at: int, error: type[BaseException], after: bool = False) -> None:
        real, count = api.attach, [0]

        def attach(*args: Any) -> None:
            count[0] += 1
            if count[0] == at and not after:
                raise error
            real(*args)
            if count[0] == at:
                raise error

        monkeypatch.setattr(api, "attach", attach)

    return plan


@pytest.mark.parametrize("settings", [STREAMING, SHARED], ids=["streaming", "shared"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_patch_leaves_nothing(
    failing: Any, settings: dict[str, Any], error: type[BaseException], at: int, after: bool
) -> None:
    model = fresh()
    before = tree(model)
    failing(at, error, after)
    with pytest.raises(error):
        patch_model(model, **settings)
    assert tree(model) == before and not carrying(model)
    with pytest.raises(NotPatchedError):
        get_patch(model)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_block_leaves_the_patch_that_was_there(failing: Any, at: int, after: bool) -> None:
    model = fresh()
    first = get_patch(patch_model(model, **STREAMING))
    ids = zoo.prompt(model, 1, 40)
    want, before = model(ids).logits, tree(model)
    failing(at, KeyboardInterrupt, after)
    with pytest.raises(KeyboardInterrupt):
        patched(model, "dense").__enter__()
    assert get_patch(model) is first and torch.equal(model(ids).logits, want)
    unpatch_model(model)
    assert not carrying(model)
    del before


def test_threads_may_fight_over_a_model() -> None:
    model, odd = fresh(), []
    before = tree(model)

    def fight() -> None:
        for _ in range(60):
            for act, allowed in (
                (lambda: patch_model(model, **SHARED), AlreadyPatchedError),
                (lambda: unpatch_model(model), NotPatchedError),
            ):
                try:
                    act()
                except allowed:
                    pass
                except Exception as error:
                    odd.append(repr(error))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=fight) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(switch)
    assert not odd
    with suppress(NotPatchedError):
        unpatch_model(model)
    assert tree(model) == before


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Ctrl-C at the n-th line that is run inside hfpatch/api.py and hfpatch/runtime/injection.py, once.

    Not between the steps of a `with` block itself, which Python does not let anyone guard.
    """
    count, files = [0], (api.__file__, hfpatch.runtime.injection.__file__)

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return trace
        if event == "line" and frame.f_code.co_name not in ("_in_place_of_any", "patched"):
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def interrupt_everywhere(act: Callable[[], None], check: Callable[[bool], None]) -> int:
    """Run `act` with Ctrl-C at its first line, its second, ... until it ends without; `check` each time."""
    for line in range(1, 2000):
        try:
            with interrupted_at(line):
                act()
        except KeyboardInterrupt:
            check(False)
        else:
            check(True)
            return line
    raise AssertionError("did not end")


def test_ctrl_c_at_any_line_of_patching_and_unpatching() -> None:
    model = fresh()
    clean = tree(model)

    def whole() -> bool:
        assert len(carrying(model)) in (0, 3)
        if carrying(model):
            get_patch(model)
            return True
        assert tree(model) == clean
        return False

    def on(done: bool) -> None:
        assert whole() or not done
        if whole():
            unpatch_model(model)
        assert tree(model) == clean

    def off(done: bool) -> None:
        assert not (whole() and done)
        if not whole():
            patch_model(model, **SHARED)

    assert interrupt_everywhere(lambda: patch_model(model, **SHARED), on) > 60
    patch_model(model, **SHARED)
    assert interrupt_everywhere(lambda: unpatch_model(model), off) > 40
    unpatch_model(model)
    assert tree(model) == clean


def test_ctrl_c_at_any_line_of_a_block_over_a_patch() -> None:
    model = fresh()
    first = get_patch(patch_model(model, **STREAMING))

    def block() -> None:
        with patched(model, "dense"):
            pass

    def check(done: bool) -> None:
        assert len(carrying(model)) == 3 and get_patch(model) is first

    assert interrupt_everywhere(block, check) > 100
