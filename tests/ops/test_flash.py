"""The flash executor: by contract against libraries in plain PyTorch, and through the real ones on a GPU."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from flash_stand_ins import STAND_INS, module
from helpers import RATIO, assert_close, inputs, layout_of, moved, random_map, selections

from hfpatch.core.selection import Causal, Rows, SinkWindow
from hfpatch.errors import ExecutorError
from hfpatch.ops import attend, executors, flash_libraries, self_check
from hfpatch.ops.call import Problem

NONE = {"flash_attn": None, "flash_attn_interface": None, "flash_attn.cute": None}
SHAPES = [(1, 2, 2, 63, 63), (2, 4, 1, 20, 111), (3, 8, 2, 1, 257), (1, 7, 1, 40, 45)]
KINDS = {
    "causal": Causal(), "window": SinkWindow(0, 17), "window of one": SinkWindow(0, 1),
    "window of all": SinkWindow(0, 999), "sinks and window": SinkWindow(4, 28), "sinks and all": SinkWindow(9, 999),
}  # fmt: skip


@pytest.fixture
def install(monkeypatch):
    """Install stand-ins on a pretended card of a generation; everything else of flash-attn is absent."""
    monkeypatch.setattr(self_check, "_FOUND", {})

    def installed(*names, generation=9):
        flash_libraries.attention_of.cache_clear()
        for name in NONE:
            monkeypatch.setitem(sys.modules, name, module(name) if name in names else None)
        if "flash_attn.cute" in names and "flash_attn" not in names:  # a namespace: 4 alone has no flash_attn_func
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setattr(flash_libraries, "card", lambda device: generation)

    yield installed
    flash_libraries.attention_of.cache_clear()


def compare(q, k, v, selection, device="cpu", **kw):
    """Compare with the reference on the same inputs."""
    kw = {"scale": q.shape[-1] ** -0.5, **kw}
    ref = attend(q, k, v, selection=selection, executor="reference", **kw)
    there = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in kw.items()}
    q, k, v = (t.to(device) for t in (q, k, v))
    got = attend(q, k, v, selection=moved(selection, q.device), executor="flash", **there)
    assert got.executor == "flash" and got.out.dtype == q.dtype and got.lse.dtype == torch.float32
    assert_close("out", ref.out, got.out.cpu(), RATIO[q.dtype])
    assert_close("lse", ref.lse, got.lse.cpu(), RATIO[q.dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_each_library(name, kind, dtype, install):
    install(name)
    for shape in SHAPES:
        q, k, v = inputs(*shape, dtype=dtype)
        compare(q, k, v, KINDS[kind])
        compare(q, k, v, KINDS[kind], scale=0.4, softcap=1.5, sinks=torch.randn(shape[1]) * 2)


@pytest.mark.parametrize("name", STAND_INS)
def test_ranges_of_queries(name, install):
    install(name)
    q, k, v = inputs(2, 4, 2, 63, 80, dtype=torch.float16)
    parts = Rows([(30, SinkWindow(0, 9)), (40, SinkWindow(2, 9)), (63, Causal())])
    compare(q, k, v, parts, sinks=torch.randn(4))


@pytest.mark.parametrize("layout", ["contiguous", "static", "fused"])
def test_strides(layout, install):
    install("flash_attn")
    q, k, v = inputs(2, 4, 2, 63, 63, dtype=torch.float16, layout=layout)
    for kind in KINDS.values():
        compare(q, k, v, kind)


def test_the_first_library_that_can_is_taken(install):
    def taken(generation, d=64, dv=None, names=tuple(STAND_INS)):
        install(*names, generation=generation)
        found = flash_libraries.library(generation, d, dv or d)
        return found if isinstance(found, str) else found.name

    assert taken(9) == "flash-attn 3" and taken(10) == "flash-attn 4" and taken(8) == taken(12) == "flash-attn 2"
    assert taken(9, 20) == "flash-attn 2" and taken(9, 192, 128) == "flash-attn 3"
    assert taken(10, 192, 128) == taken(10, 256) == "flash-attn 4" and taken(10, 192) == "flash-attn 2"
    assert taken(9, names=("flash_attn.cute",)) == "flash-attn 4"
    assert taken(9, 64, 48) == (
        "flash-attn 3 and flash-attn 4 and flash-attn 2 cannot run keys that are 64 wide and values that are 48 wide "
        "on this card"
    )
    assert taken(7).startswith("no flash-attn is made for cards of compute capability 7;")
    assert taken(8, names=("flash_attn.cute",)).startswith("no flash-attn for this card is installed")


def test_other_widths_of_values(install):
    install("flash_attn_interface")
    compare(*inputs(1, 4, 2, 30, 41, d=192, dv=128, dtype=torch.float16), SinkWindow(3, 8), softcap=2.0)


def test_says_what_it_cannot_run(install):
    install("flash_attn")
    q, k, v = inputs(1, 2, 1, 5, 7, dtype=torch.float16)

    def refused(says, **change):
        args = {"q": q, "k": k, "v": v, "selection": None, "scale": 1.0, **change}
        with pytest.raises(ExecutorError, match=f"'flash' cannot run this call: {says}"):
            attend(**args, executor="flash")

    refused("it does not run a Predicate", selection=selections(layout_of(q, k))["predicate"])
    refused("flash-attn 4 takes block lists in its kernel's", selection=random_map(layout_of(q, k), 1, 4, 4, 2))
    refused("its windows hold the query's own token", selection=SinkWindow(3, 0))
    refused("flash-attn takes no bias per key", bias=torch.zeros(1, 1, 7))
    refused("its log-sum-exp has no gradient", q=q.clone().requires_grad_())
    refused("it does not run torch.float32", **{n: t.float() for n, t in (("q", q), ("k", k), ("v", v))})
    install()
    refused("no flash-attn for this card is installed; run `pip install 'hfpatch\\[flash\\]'`")
    install("flash_attn", generation=None)
    refused("it needs an NVIDIA GPU")


def test_dense_with_its_lse_goes_to_it_by_default_once_proven(install, monkeypatch):
    table = [r if r.executor != "flash" else executors.Rule("flash", None, r.kinds, r.phases, None, r.proven)
             for r in executors.TABLE]  # fmt: skip
    monkeypatch.setattr(executors, "TABLE", table)
    q, k, v = inputs(1, 4, 2, 20, 63, dtype=torch.float16)

    def chosen(selection, **change):
        p = {"q": q, "k": k, "v": v, "selection": selection, "scale": 0.2, **change}
        return executors.choose(Problem(**p)).name

    install("flash_attn")
    assert chosen(Causal()) == "flash" and chosen(Causal(), sinks=torch.zeros(4)) == "flash"
    assert chosen(Causal(), q=q[:, :, :1]) == chosen(SinkWindow(0, 9)) == "torch"
    assert chosen(Causal(), q=q.float(), k=k.float(), v=v.float()) == "torch"
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", lambda *a, **kw: (v * 0, None, None))
    flash_libraries.attention_of.cache_clear()
    with pytest.warns(UserWarning, match="Executor 'flash' is left aside for some calls"):
        assert chosen(Causal(), softcap=2.0) == "torch"
    install()
    assert chosen(Causal()) == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STAND_INS)
def test_with_the_library_itself(name, kind, monkeypatch):
    if not torch.cuda.is_available() or find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs a GPU and {STAND_INS[name][0]}")
    lib = next(known for known in flash_libraries.LIBRARIES if known.module == name)
    if torch.cuda.get_device_capability()[0] not in lib.cards or flash_libraries.attention_of(name) is None:
        pytest.skip(f"{lib.name} is not for this card, or does not load")
    monkeypatch.setattr(flash_libraries, "LIBRARIES", (lib,))
    for shape in SHAPES:
        for d in (64, 128, 256):
            q, k, v = inputs(*shape, d=d, dtype=torch.bfloat16)
            compare(q, k, v, KINDS[kind], device="cuda")
            compare(q, k, v, KINDS[kind], device="cuda", softcap=3.0, sinks=torch.randn(shape[1]))
