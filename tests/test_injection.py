"""Patching and undoing: copies, saving, nested blocks, hooks, threads, what is refused."""

import copy
import io
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from injection_helpers import SPARSE, fresh
from test_invariants import LENGTH, logits, tree
from transformers import LlamaForCausalLM, PreTrainedModel

import hfpatch
from hfpatch import (
    AlreadyPatchedError,
    ConfigError,
    NotPatchedError,
    UnsupportedModelError,
    get_patch,
    patch_model,
    patched,
    unpatch_model,
)

some = pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next", "llava"])


def saved(model: PreTrainedModel, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def by_pickle(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@some
@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle, by_torch_save], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_patched_on_its_own(name: str, copier: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model = fresh(name)
    ids = zoo.prompt(model, 2, LENGTH)
    dense = logits(model, ids)
    patch_model(model, **SPARSE)
    sparse = logits(model, ids)
    twin = copier(model)
    get_patch(model).reset_report()
    assert torch.equal(logits(twin, ids), sparse) and not torch.equal(sparse, dense)
    assert get_patch(twin) is not get_patch(model)
    assert all(not line.stats.calls for line in get_patch(model).report().lines)
    before = tree(model)
    unpatch_model(twin)
    assert torch.equal(logits(twin, ids), dense) and tree(model) == before
    assert torch.equal(logits(model, ids), sparse)
    patch_model(twin, "streaming", sink=1, window=3)
    assert torch.equal(logits(unpatch_model(model), ids), dense)
    assert not torch.equal(logits(twin, ids), sparse)


@some
def test_saving_a_patched_model_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    want, keys = saved(model, tmp_path / "plain"), list(model.state_dict())
    with patched(model, **SPARSE):
        assert list(model.state_dict()) == keys
        assert saved(model, tmp_path / "patched") == want
        again = type(model).from_pretrained(tmp_path / "patched")
    assert all("hfpatch" not in str(value) for key, value in tree(again).items())
    with pytest.raises(NotPatchedError):
        get_patch(again)


def test_nested_contexts_put_each_patch_back() -> None:
    model = fresh()
    ids = zoo.prompt(model, 2, LENGTH)
    before, dense = tree(model), logits(model, ids)
    with patched(model, **SPARSE) as outer:
        wide = logits(model, ids)
        with patched(model, "streaming", sink=0, window=2) as inner:
            narrow = logits(model, ids)
            assert get_patch(model) is inner
        assert get_patch(model) is outer and torch.equal(logits(model, ids), wide)
    assert tree(model) == before and torch.equal(logits(model, ids), dense)
    assert not torch.equal(wide, dense) and not torch.equal(narrow, wide)


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "nested"])
def test_an_exception_inside_the_block_restores(outer: bool) -> None:
    model = fresh()
    if outer:
        patch_model(model, **SPARSE)
    ids = zoo.prompt(model, 1, LENGTH)
    before, want, handle = tree(model), logits(model, ids), vars(model).get(hfpatch.api.HANDLE)
    with pytest.raises(ZeroDivisionError), patched(model, "streaming", window=3):
        assert not torch.equal(logits(model, ids), want)
        raise ZeroDivisionError
    assert vars(model).get(hfpatch.api.HANDLE) is handle
    assert torch.equal(logits(model, ids), want)
    assert outer or tree(model) == before


def test_unpatching_inside_the_block_is_allowed() -> None:
    model = fresh()
    before = tree(model)
    with patched(model, **SPARSE):
        unpatch_model(model)
        assert tree(model) == before
    with patched(model, **SPARSE):
        unpatch_model(model)
        patch_model(model, "dense")
    assert tree(model) == before


def test_double_patch_and_double_unpatch_raise() -> None:
    model = fresh()
    patch_model(model, **SPARSE)
    before, patch = tree(model), get_patch(model)
    with pytest.raises(AlreadyPatchedError, match="unpatch_model"):
        patch_model(model, "dense")
    assert tree(model) == before
    patch.unpatch()
    for undo in (patch.unpatch, lambda: unpatch_model(model), lambda: get_patch(model)):
        with pytest.raises(NotPatchedError):
            undo()
    with patched(model, "dense"), pytest.raises(NotPatchedError, match="undone already"):
        patch.unpatch()


def test_hooks_of_others_stay() -> None:
    model = fresh()
    seen: list[int] = []
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(lambda *_: seen.append(1))
    patch_model(model, **SPARSE)
    late = attention.register_forward_pre_hook(lambda *_: seen.append(2))
    logits(model, zoo.prompt(model, 1, 5))
    unpatch_model(model)
    logits(model, zoo.prompt(model, 1, 5))
    assert seen == [1, 2, 1, 2]
    handle.remove(), late.remove()
    assert not attention._forward_pre_hooks and not attention._forward_pre_hooks_with_kwargs


def test_models_sharing_one_config_do_not_meet() -> None:
    first = fresh()
    second = LlamaForCausalLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    assert second.config is first.config
    ids = zoo.prompt(first, 2, LENGTH)
    dense = logits(second, ids)
    with patched(first, **SPARSE):
        sparse = logits(first, ids)
        assert torch.equal(logits(second, ids), dense)
        with patched(second, "streaming", sink=0, window=2):
            assert torch.equal(logits(first, ids), sparse) and not torch.equal(logits(second, ids), sparse)
        assert torch.equal(logits(second, ids), dense)
    assert first.config._attn_implementation == "sdpa"


def test_threads_do_not_mix_models_or_masks() -> None:
    models = [fresh(), fresh("gemma2", seed=1)]
    batches = []
    for seed in (0, 1):
        ids = zoo.prompt(models[0], 3, LENGTH, seed=seed)
        batches += [zoo.left_pad(ids, [LENGTH, 40, 25]), zoo.left_pad(ids, [12, 30, LENGTH])]
    patch_model(models[0], **SPARSE)
    patch_model(models[1], "streaming", sink=0, window=5)
    want = {(m, n): logits(models[m], b, attention_mask=a) for m in (0, 1) for n, (b, a) in enumerate(batches)}
    wrong: list[Any] = []

    def work(thread: int) -> None:
        try:
            for step in range(8):
                m, n = (thread + step) % 2, (thread * 3 + step) % len(batches)
                ids, mask = batches[n]
                if not torch.equal(logits(models[m], ids, attention_mask=mask), want[m, n]):
                    wrong.append((thread, step))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_unknown_executor_raises_before_anything_changes() -> None:
    model = fresh()
    before = tree(model)
    with pytest.raises(ConfigError, match=r"executor='turbo'.*'reference'.*'torch'"):
        patch_model(model, "streaming", executor="turbo")
    assert tree(model) == before


@pytest.mark.parametrize("thing", [None, "llama", torch.nn.Linear(2, 2), [1]])
def test_what_is_not_a_model_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        patch_model(thing, "streaming")


def test_an_unpatched_model_set_to_our_name_is_told_what_to_do() -> None:
    model = fresh()
    model.set_attn_implementation("hfpatch")
    with pytest.raises(UnsupportedModelError, match="patch_model"):
        logits(model, zoo.prompt(model, 1, 5))


def test_the_report_counts_calls_and_can_be_reset() -> None:
    model = fresh()
    with patched(model, **SPARSE) as patch:
        model.generate(zoo.prompt(model, 1, 20), max_new_tokens=4, do_sample=False)
        lines = {(x.layer, x.phase): x.stats.calls for x in patch.report().lines}
        assert lines == {(n, phase): count for n in range(3) for phase, count in (("prefill", 1), ("decode", 3))}
        assert json.loads(json.dumps(patch.report().to_dict()))["patched"] == 3
        assert patch.report().density("decode") == pytest.approx(10 * 3 / (21 + 22 + 23))
        patch.reset_report()
        assert not patch.report().lines
