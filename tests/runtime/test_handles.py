"""Putting a patch on and taking it off: atomic, safe between threads, one patch per layer whoever asks."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import zoo
from test_invariants import tree
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

import hfpatch
import hfpatch.api as api
from hfpatch import AlreadyPatchedError, HfpatchError, NotPatchedError, get_patch, patch_model, patched, unpatch_model
from hfpatch.runtime.injection import RUNTIME

STREAMING: dict[str, Any] = {"method": "streaming", "sink": 2, "window": 8}
SHARED: dict[str, Any] = {
    "method": "dhsa", "layer_sharing": "selection", "budget": 24, "sink": 2, "local": 4, "block_q": 4,
    "question_tokens": 0,
}  # fmt: skip
QUERIES: dict[str, Any] = {"method": "flux", "sparse_layers": "0-"}


def fresh() -> PreTrainedModel:
    return zoo.SUPPORTED["llama"].build()


def carrying(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if RUNTIME in vars(m)]


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


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (2, 0, 1), (1, 2, 0), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("outer", [False, True], ids=["bare", "over a patch"])
def test_blocks_may_be_left_in_any_order(order: tuple[int, ...], outer: bool) -> None:
    model = fresh()
    if outer:
        patch_model(model, "streaming", sink=1, window=5)
    ids = zoo.prompt(model, 1, 40)
    want, before = model(ids).logits, tree(model)
    blocks = [patched(model, "streaming", sink=2, window=8 + n) for n in range(len(order))]
    handles = [block.__enter__() for block in blocks]
    left = list(range(len(order)))
    for n in order:
        blocks[n].__exit__(None, None, None)
        left.remove(n)
        if left:
            assert get_patch(model) is handles[max(left)]
    assert torch.equal(model(ids).logits, want)
    assert outer or tree(model) == before


def part_and_whole(kind: str) -> tuple[nn.Module, nn.Module, PreTrainedModel]:
    """Two objects around the same layers, and a model to run."""
    model = fresh()
    if kind == "inner and outer":
        return model.model, model, model
    if kind == "wrapper":
        return model, nn.DataParallel(model), model
    if kind == "two heads":
        other = LlamaForSequenceClassification(model.config)
        other.model = model.model
        return model, other, model
    return model, nn.Sequential(model), model


@pytest.mark.parametrize("turned", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("kind", ["inner and outer", "wrapper", "two heads", "container"])
def test_layers_take_one_patch_through_whatever_object(kind: str, turned: bool) -> None:
    one, two, model = part_and_whole(kind)
    one, two = (two, one) if turned else (one, two)
    ids = zoo.prompt(model, 1, 40)
    want, clean = model(ids).logits, tree(model)
    patch_model(one, **STREAMING)
    sparse, before = model(ids).logits, tree(model)
    with pytest.raises(AlreadyPatchedError, match="carries a patch already"):
        patch_model(two, "zerotuning", gamma=2.0)
    assert tree(model) == before and torch.equal(model(ids).logits, sparse)
    assert get_patch(two).report().density() < 1
    with patched(two, "dense"):
        assert torch.equal(model(ids).logits, want)
    assert torch.equal(model(ids).logits, sparse)
    unpatch_model(two)
    assert tree(model) == clean and torch.equal(model(ids).logits, want)
    for thing in (one, two):
        with pytest.raises(NotPatchedError):
            get_patch(thing)
    patch_model(two, **STREAMING)
    assert torch.equal(model(ids).logits, sparse)
    unpatch_model(one)
    assert tree(model) == clean


def test_a_part_of_the_patched_layers_is_not_undone_alone() -> None:
    model = patch_model(fresh(), **STREAMING)
    with pytest.raises(NotPatchedError, match="1 of 3 patched layers"):
        unpatch_model(model.model.layers[1])
    assert len(carrying(model)) == 3


def test_the_object_that_was_patched_may_go() -> None:
    model = fresh()
    wrapper = nn.Sequential(model)
    patch_model(wrapper, **STREAMING)
    del wrapper
    ids = zoo.prompt(model, 1, 40)
    model(ids)
    assert "streaming" in str(get_patch(model).report()) and get_patch(model).config.methods[0].window == 8
    unpatch_model(model)
    assert not carrying(model)


def test_merged_adapters_keep_the_patch_and_its_undoing() -> None:
    peft = pytest.importorskip("peft", reason="peft, which nothing else needs, is not installed")
    model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=["q_proj"]))
    patch_model(model, **STREAMING)
    merged = model.merge_and_unload()
    merged(zoo.prompt(merged, 1, 40))
    assert get_patch(merged).report().density() < 1
    unpatch_model(merged)
    assert not carrying(merged)


def test_copies_of_a_part_stand_alone() -> None:
    model = patch_model(fresh(), **STREAMING)
    twin = copy.deepcopy(model.model)
    assert len(carrying(twin)) == 3
    unpatch_model(twin)
    assert not carrying(twin) and len(carrying(model)) == 3


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


SPANS: list[Any] = [5, None, [5], ["ab"], [(0, "x")], [(0.5, 2.5)], "xx", [(0, float("nan"))], {}, [[1, 2, 3]], ()]


@pytest.mark.parametrize("rows", [*SPANS, [(True, 2)], [(3, 2)], [(-1, 2)]], ids=repr)
def test_spans_that_are_none(rows: Any) -> None:
    model = patch_model(fresh(), **STREAMING)
    with pytest.raises(HfpatchError, match="one \\(start, stop\\) per row"), get_patch(model).spans(question=rows):
        pass


@pytest.mark.parametrize("thing", [None, 5, "model", object(), PreTrainedModel, nn.Linear])
def test_what_is_no_model(thing: Any) -> None:
    for act in (lambda: api.plan_patch(thing, "streaming"), lambda: patch_model(thing, "streaming")):
        with pytest.raises(HfpatchError, match="Expected a loaded Transformers model"):
            act()
    with pytest.raises(NotPatchedError):
        get_patch(thing)
