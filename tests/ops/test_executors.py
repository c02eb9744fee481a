"""The table of executors, its errors, and what every executor must do."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_close, check, inputs, layout_of, random_map, selections
from torch import Tensor

from hfpatch.core.selection import Causal, Layout, Rows, Selection, SinkWindow
from hfpatch.errors import ExecutorError
from hfpatch.ops import Executor, Rule, attend, executors, list_executors, merge, register_executor


def test_table():
    assert {"reference", "torch", "triton", "flex"} <= {e.name for e in list_executors()}
    q, k, v = inputs(1, 2, 1, 5, 7)
    assert attend(q, k, v, selection=None, scale=1.0).executor == "torch"
    assert attend(q, k, v, selection=None, scale=1.0, executor="reference").executor == "reference"


def test_rules_choose(monkeypatch):
    """The first rule that speaks of a call and whose executor can run it; a rule is by device, kind, phase, dtype."""
    monkeypatch.setattr(executors, "TABLE", list(executors.TABLE))
    monkeypatch.setattr(executors, "_EXECUTORS", dict(executors._EXECUTORS))

    def add(name, able=True, **rule):
        run = executors._EXECUTORS["reference"].run
        made = Executor(name, lambda p: None if able else "not today", run)
        register_executor(made, Rule(name, **{n: frozenset(v) for n, v in rule.items()}))

    def chosen(selection, lq=9, dtype=torch.float32):
        q, k, v = (t.to(dtype) for t in inputs(1, 2, 1, lq, 9))
        return attend(q, k, v, selection=selection, scale=1.0).executor

    add("elsewhere", devices={"cuda"})
    add("windows", kinds={"window", "causal"}, phases={"prefill", "decode"})
    add("unable", able=False)
    add("halves", devices={"cpu"}, dtypes={torch.bfloat16}, phases={"chunk"})
    window = SinkWindow(1, 3)
    assert chosen(window) == chosen(None) == chosen(window, lq=1) == "windows"
    assert chosen(window, lq=4) == "torch" and chosen(window, lq=4, dtype=torch.bfloat16) == "halves"
    assert chosen(Rows([(4, window), (9, Causal())])) == "windows"
    assert chosen(Rows([(4, window), (9, Even())])) == chosen(Even()) == "torch"


def test_unknown_and_unable():
    q, k, v = inputs(1, 2, 1, 5, 7)
    with pytest.raises(ExecutorError, match="no executor called 'nope'; choose from"):
        attend(q, k, v, selection=None, scale=1.0, executor="nope")
    register_executor(Executor("never", lambda p: "it is Sunday", lambda p: (p.q, p.q)))
    with pytest.raises(ExecutorError, match="'never' cannot run this call: it is Sunday"):
        attend(q, k, v, selection=None, scale=1.0, executor="never")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a | {"k": a["k"][:, :, :4]}, "do not fit together"),
        (lambda a: a | {"k": a["k"][:, :, :4], "v": a["v"][:, :, :4]}, "5 queries and only 4 keys"),
        (lambda a: a | {"sinks": torch.zeros(3)}, "one logit per query head"),
        (lambda a: a | {"bias": torch.zeros(1, 1, 6)}, "bias must have shape"),
        (lambda a: a | {"q": a["q"].bfloat16()}, "share one floating dtype"),
        (lambda a: a | {"q": a["q"][:, :3]}, "cannot share"),
        (lambda a: a | {"q": a["q"][0]}, "batch, heads, length"),
    ],
)
def test_bad_shapes(change, says):
    q, k, v = inputs(1, 4, 2, 5, 7)
    with pytest.raises(ExecutorError, match=says):
        attend(**change({"q": q, "k": k, "v": v, "selection": None, "scale": 1.0}))


@pytest.mark.parametrize("executor", ["reference", "torch"])
def test_equals_sdpa(executor):
    q, k, v = inputs(2, 8, 2, 63, 63)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = attend(q, k, v, selection=None, scale=32**-0.5, executor=executor)
    assert_close("out", want.transpose(1, 2), got.out, 1e-5)


@pytest.mark.parametrize("executor", ["reference", "torch"])
def test_by_hand(executor):
    q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.eye(4)[None, None, :3]
    kw = {"sinks": torch.tensor([2.0]).log(), "bias": torch.tensor([[[3.0, 1.0, 1.0]]]).log()}
    got = attend(q, k, v, selection=SinkWindow(1, 1), scale=1.0, executor=executor, **kw)
    want = torch.tensor([[3, 1, 0, 0], [3, 0, 1, 0]]) / 6
    assert_close("out", want[None, :, None], got.out, 1e-6)
    assert_close("lse", torch.tensor([[[6.0, 6.0]]]).log(), got.lse, 1e-6)


@pytest.mark.parametrize("executor", ["reference", "torch"])
def test_rows_without_keys(executor):
    q, k, v = inputs(1, 4, 2, 111, 111)
    sel = random_map(layout_of(q, k), 2, 16, 16, 4)
    sel.counts[:, :, 2] = 0
    for sinks in (None, torch.randn(4)):
        got = attend(q, k, v, selection=sel, scale=0.2, sinks=sinks, executor=executor)
        assert got.out[:, 32:48].abs().max() == 0
        want = torch.full((1, 4, 16), -torch.inf) if sinks is None else sinks[None, :, None].expand(1, 4, 16)
        assert_close("lse", want, got.lse[:, :, 32:48], 1e-6)


class Even(Selection):
    """A selection of a class the executors do not know, which forgets to be causal."""

    def mask(self, at: Layout, keys: Tensor | None = None) -> Tensor:
        i, j = at.positions(keys)
        return ((i + j) % 2 == 0)[None, None]


@pytest.mark.parametrize("lq", [1, 50, 257])
def test_unknown_selection(lq):
    q, k, v = inputs(2, 4, 2, lq, 257)
    check(q, k, v, Even())


LONG = ("window", "blocks_even", "blocks_uneven", "tokens", "predicate", "rows", "both")


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("lq", [1500, 1100, 1])
def test_long(lq, name):
    q, k, v = inputs(1, 8, 2, lq, 1500, d=16)
    at = layout_of(q, k)
    wide = {
        "window": SinkWindow(4, 300),
        "blocks_even": random_map(at, 2, 64, 64, 5, even=True),
        "tokens": random_map(at, 2, 64, 1, 200, even=True),
    }
    check(q, k, v, {**selections(at), **wide}[name])


@pytest.mark.parametrize("name", ["causal", "window", "blocks_even", "blocks_uneven", "predicate"])
def test_gradients(name):
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 4, 2, 33, 50, d=8))
    sinks = torch.randn(4, dtype=torch.double, requires_grad=True)
    sel, grads = selections(layout_of(q, k))[name], {}
    for executor in ("reference", "torch"):
        got = attend(q, k, v, selection=sel, scale=0.3, sinks=sinks, executor=executor)
        grads[executor] = torch.autograd.grad(got.out.square().sum() + got.lse.sum(), (q, k, v, sinks))
    for n, ref, got in zip("qkvs", grads["reference"], grads["torch"], strict=True):
        assert_close(f"d{n}", ref, got, 1e-5)


def test_merge_of_halves_is_the_whole():
    q, k, v = inputs(1, 2, 2, 9, 9)
    whole = attend(q, k, v, selection=Causal(), scale=0.2, executor="reference")
    left = attend(q, k, v, selection=SinkWindow(3, 0), scale=0.2, executor="reference")
    right = attend(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], selection=None, scale=0.2, executor="reference")
    parts = [(left.out.transpose(1, 2)[:, :, 3:], left.lse[:, :, 3:]), (right.out.transpose(1, 2), right.lse)]
    out, lse = merge(parts)
    assert_close("out", whole.out.transpose(1, 2)[:, :, 3:], out, 1e-5)
    assert_close("lse", whole.lse[:, :, 3:], lse, 1e-5)


def test_merge_of_nothing():
    nothing = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    out, lse = merge([nothing, nothing])
    assert out.abs().max() == 0 and lse.isneginf().all()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_autograd(mode):
    with mode():
        q, k, v = inputs(1, 4, 2, 63, 63)
        for sel in selections(layout_of(q, k)).values():
            check(q, k, v, sel)


def test_imports_only_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import importlib.util as u, types; "
        "pkg = types.ModuleType('hfpatch'); pkg.__path__ = list(u.find_spec('hfpatch').submodule_search_locations); "
        "sys.modules['hfpatch'] = pkg; import hfpatch.ops; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names; "
        "print(sorted(new - {'hfpatch', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
