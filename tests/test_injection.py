"""Patching and undoing: copies, saving, other implementations, odd masks, threads, layer choice."""

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
from test_invariants import LENGTH, assert_close, built, logits, tree
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import hfpatch
from hfpatch import (
    AlreadyPatchedError,
    ConfigError,
    NothingPatchedError,
    NotPatchedError,
    UnsupportedModelError,
    get_patch,
    patch_model,
    patched,
    unpatch_model,
)
from hfpatch.config.layers import parse_layers

SPARSE: dict[str, Any] = {"method": "streaming", "sink": 2, "window": 8}
some = pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next", "llava"])


def fresh(name: str = "llama", **overrides: Any) -> PreTrainedModel:
    return zoo.SUPPORTED[name].build(**overrides)


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


def test_the_base_follows_set_attn_implementation() -> None:
    model = fresh()
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, "streaming", sink=2, window=8, phase="decode") as patch:
        model.set_attn_implementation("eager")
        logits(model, ids)
        assert {n for line in patch.report().lines for n in line.stats.executors} == {"eager"}
    with patched(model, **SPARSE) as patch:
        sparse = logits(model, ids)
        model.set_attn_implementation("sdpa")
        assert_close("logits", logits(model, ids), sparse)
    assert model.config._attn_implementation == "sdpa"
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_attention_weights_come_from_the_base_and_the_report_says_so(name: str) -> None:
    model = fresh(name)
    model.set_attn_implementation("eager")
    ids = zoo.prompt(model, 2, LENGTH)
    with torch.no_grad():
        want = model(ids, output_attentions=True)
        with patched(model, **SPARSE) as patch:
            got = model(ids, output_attentions=True)
            assert set(patch.report().fallbacks()) == {"attention weights were asked for"}
            assert "dense in 1 of them: attention weights were asked for" in str(patch.report())
    assert torch.equal(got.logits, want.logits)
    assert len(got.attentions) == len(want.attentions) > 0
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, want.attentions, strict=True))


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


def test_a_dense_patch_compiles_whole() -> None:
    model = fresh()
    ids = zoo.prompt(model, 2, 17)
    want = logits(model, ids)
    with patched(model, "dense"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(logits(compiled, ids), want)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_sparse_patch_runs_compiled_with_graph_breaks() -> None:
    model = fresh(num_hidden_layers=1)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, **SPARSE):
        want = logits(model, ids)
        assert_close("logits", logits(torch.compile(model, backend="eager"), ids), want)
    torch._dynamo.reset()


def four_d(ids: Tensor) -> dict[str, Any]:
    """Every query also sees the next key: wider than causal."""
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(1)
    return {"attention_mask": keep.expand(len(ids), 1, -1, -1)}


def additive(ids: Tensor) -> dict[str, Any]:
    bias = torch.linspace(-1, 0, LENGTH).expand(LENGTH, -1)
    causal = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    return {"attention_mask": (bias.tril() + causal).expand(len(ids), 1, -1, -1)}


def packed(ids: Tensor) -> dict[str, Any]:
    return {"position_ids": torch.cat([torch.arange(30), torch.arange(LENGTH - 30)]).expand(len(ids), -1)}


def hole(ids: Tensor) -> dict[str, Any]:
    mask = torch.ones_like(ids)
    mask[0, 20:24] = 0
    return {"attention_mask": mask}


WIDER, HOLE = "more than causality", "padding inside a row"


@pytest.mark.parametrize(
    "name,odd,reason",
    [
        (name, odd, reason)
        for name in ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3")
        for odd, reason in ((four_d, WIDER), (additive, WIDER), (packed, WIDER), (hole, HOLE))
        if (name, odd) != ("gpt_oss", packed)  # the model itself does not separate packed sequences
    ],
)
def test_odd_masks_run_dense_and_say_why(name: str, odd: Callable[[Tensor], dict[str, Any]], reason: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, LENGTH)
    kwargs = odd(ids)
    if zoo.SUPPORTED[name].sliding and odd in (four_d, additive):
        kwargs["attention_mask"] = dict.fromkeys(("full_attention", "sliding_attention"), kwargs["attention_mask"])
    want = logits(model, ids, use_cache=False, **kwargs)
    with patched(model, **SPARSE) as patch:
        got = logits(model, ids, use_cache=False, **kwargs)
        assert any(reason in r for r in patch.report().fallbacks()), patch.report().fallbacks()
        assert patch.report().density() == 1.0
    assert torch.equal(got, want)
    plain = logits(model, ids, use_cache=False)
    assert not torch.equal(want, plain)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_through_a_dense_patch(checkpointing: bool) -> None:
    model = fresh().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = zoo.prompt(model, 2, 17)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    want = gradients()
    with patched(model, "dense"):
        got = gradients()
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_gradients_through_a_sparse_patch_equal_the_reference() -> None:
    model = fresh()
    ids = zoo.prompt(model, 2, 33)
    grads = []
    for executor in ("torch", "reference"):
        with patched(model, **SPARSE, executor=executor):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close("gradients", *grads)


def test_peft_adapters() -> None:
    peft = pytest.importorskip("peft", reason="peft, which nothing else needs, is not installed")
    model = fresh()
    ids = zoo.prompt(model, 2, LENGTH)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    want = logits(adapted, ids)
    with patched(model, **SPARSE):
        sparse = logits(adapted, ids)
    with patched(adapted, **SPARSE):
        assert torch.equal(logits(adapted, ids), sparse)
    assert not torch.equal(sparse, want) and torch.equal(logits(adapted, ids), want)


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


LAYERS: list[tuple[Any, list[int]]] = [
    (None, list(range(10))),
    (3, [3]),
    (-1, [9]),
    ([8, 0, -1, 8], [0, 8, 9]),
    ([], []),
    ("2-", list(range(2, 10))),
    ("0-3,8", [0, 1, 2, 3, 8]),
    ("-4-", [6, 7, 8, 9]),
    ("0--8", [0, 1, 2]),
    (" 1 , 2 - 3 ", [1, 2, 3]),
    ("-1", [9]),
    ("9", [9]),
]


@pytest.mark.parametrize("spec,want", LAYERS)
def test_layer_syntax(spec: Any, want: list[int]) -> None:
    assert parse_layers(spec, 10) == want


@pytest.mark.parametrize(
    "spec",
    ["", "x", "1-2-3", "1..3", "1,,2", "3-1", "-1-2", 10, -11, [0, 10], "10", "5-12", "all", "1:3", "--3", "2-,"],
)
def test_layers_that_make_no_sense_raise_before_anything_changes(spec: Any) -> None:
    model = fresh(num_hidden_layers=10)
    before = tree(model)
    with pytest.raises(ConfigError, match="layers"):
        patch_model(model, "streaming", layers=spec)
    assert tree(model) == before


@pytest.mark.parametrize("spec", [1.5, True, ["1"], {"a": 1}, [[0]]])
def test_layers_of_a_wrong_type_raise(spec: Any) -> None:
    with pytest.raises(ConfigError, match="layers"):
        hfpatch.get_method("streaming").config_class(layers=spec)


def test_methods_meet_only_where_both_were_asked_for() -> None:
    model = fresh()
    config = hfpatch.get_method("streaming").config_class
    patch_model(model, [config(sink=0, window=9, layers="1-"), config(sink=0, window=4, layers=[0, 2])])
    logits(model, zoo.prompt(model, 1, LENGTH))
    attended = {line.layer: int(line.stats.attended) for line in get_patch(model).report().lines}
    want = {n: sum(min(i + 1, w) for i in range(LENGTH)) * 8 for n, w in {0: 4, 1: 9, 2: 4}.items()}
    assert attended == want


def test_a_patch_of_one_layer_changes_that_layer_only() -> None:
    model = fresh()
    hidden = []
    ids = zoo.prompt(model, 1, LENGTH)
    for layers in (None, 1):
        if layers is not None:
            patch_model(model, **SPARSE, layers=layers)
        with torch.no_grad():
            hidden.append(model(ids, output_hidden_states=True).hidden_states)
    assert torch.equal(hidden[0][1], hidden[1][1]) and not torch.equal(hidden[0][2], hidden[1][2])


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text", "gpt_oss"])
def test_part_of_the_layers_is_said(name: str) -> None:
    with patched(built(name), **SPARSE) as patch:
        assert patch.layers == zoo.SUPPORTED[name].full_layers == [1, 3]
        assert "2 of 4 layers patched" in str(patch.report()) and "2 of 4 layers" in repr(patch)


@pytest.mark.parametrize(
    "layers,reason", [([], "not chosen"), ([0, 2], "sliding attention"), (0, "sliding attention")]
)
def test_nothing_patched(layers: Any, reason: str) -> None:
    model = built("gemma2")
    before = tree(model)
    with pytest.raises(NothingPatchedError, match=reason):
        patch_model(model, "streaming", layers=layers)
    assert tree(model) == before


def test_dense_layers_can_leave_nothing() -> None:
    with pytest.raises(NothingPatchedError, match="3 x left dense by streaming"):
        patch_model(built("llama"), "streaming", dense_layers=3)


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
