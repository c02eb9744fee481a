"""Patches on disk and their tensors, changed at random: refused by name, or finite logits; never another exception."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patch_fuzz import HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS, fixed, refused_or_finite, runs
from safetensors.torch import save
from torch import Tensor

from hfpatch import PatchConfig
from hfpatch.config.patch_config import CONFIG_FILE, TENSOR_FILE
from hfpatch.config.registry import make_config
from hfpatch.methods.dhsa.predictor import BoundaryPredictor
from hfpatch.methods.flux.router import Routers

SPARSE = {"sparse_settings": {"sink": 2, "window": 8}}
DHSA = {
    "budget": 24,
    "sink": 2,
    "local": 4,
    "block_q": 4,
    "question_tokens": 0,
    "boundaries": "predictor",
    "window": 2,
}


def gates(*names: str, rows: int = HEADS) -> dict[str, Tensor]:
    shapes = {"weight": (rows, HIDDEN), "bias": (rows,), "constant": (HEADS,)}
    return {f"layers.{n}.{name}": torch.randn(shapes[name]) for n in range(LAYERS) for name in names}


def patches() -> dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """For every method that learns: its settings and tensors that fit the tiny model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        routers = dict(Routers(range(LAYERS), HEAD).state_dict())
        return {
            "gated": ("gated", {}, gates("weight")),
            "gated-channels": ("gated", {"form": "sigmoid"}, gates("weight", "bias", rows=HIDDEN)),
            "gated-constant": ("gated", {"form": "constant"}, gates("constant")),
            "zerotuning": ("zerotuning", {}, {"gamma": torch.full((HEADS,), 2.0)}),
            "zerotuning-layers": ("zerotuning", {}, {"gamma": torch.full((LAYERS, HEADS), 0.5)}),
            "head_scale": ("head_scale", {}, {"scale": torch.rand(LAYERS, HEADS)}),
            "vertical_slash": ("vertical_slash", {"min_length": 0, "block_q": 8, "block_k": 4, "sink": 1, "local": 2},
                               {"per_head": torch.randint(1, 12, (LAYERS, HEADS, 2))}),
            "flux": ("flux", {"router": "learned", "pool": 9, **SPARSE}, routers),
            "flux-ranking": ("flux", {"router": "entropy", **SPARSE}, {"ranking": torch.rand(LAYERS)}),
            "dhsa": ("dhsa", DHSA, BoundaryPredictor(KV_HEADS * HEAD, width=8, heads=2, hidden=8).tensors()),
        }  # fmt: skip


PATCHES = patches()
names = pytest.mark.parametrize("name", sorted(PATCHES))
Tensors = dict[str, Any]


def _renamed(t: Tensors, key: str, to: str) -> Tensors:
    return {to if k == key else k: v for k, v in t.items()}


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        if t.numel():
            t.view(-1)[-1] = (
                min(max(value, -(2**62)), 2**62) if not t.is_floating_point() and value == value else value
            )
        return t

    return change


def _as(*dtypes: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    return [lambda t, d=d: t.to(d) for d in dtypes]


SHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[:0], lambda t: t[:1], lambda t: t[0], lambda t: t[None], lambda t: t[..., None], lambda t: t.flatten(),
    lambda t: t.mT if t.ndim > 1 else t[:, None], lambda t: torch.cat([t, t]), lambda t: torch.cat([t, t], -1),
    lambda t: t.reshape(-1)[0], lambda t: t.new_zeros(3, 5, 2), lambda t: t.new_zeros(()),
]  # fmt: skip
KINDS = _as(
    *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.uint8),
    *(torch.bool, torch.complex64, torch.int32),
)
VALUES = [
    _filled(v) for v in (float("nan"), float("inf"), -float("inf"), 3e38, 1e9, -1e9, 1e5, 0.0, -1.0, 1.0, 2.0**40)
]
ONLY_IN_MEMORY: list[Callable[[Tensor], Any]] = [
    lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t.to(torch.float64) * 1e300, lambda t: t.tolist(),
    lambda t: t.numpy() if t.dtype != torch.bfloat16 else 3, lambda t: None, lambda t: torch.nn.Parameter(t.float()),
]  # fmt: skip
KEYS = [
    *("", "0", "0.", ".gamma", "00.gamma", "-1.gamma", "1.gamma", "9.gamma", "0.gamma.x", "0.GAMMA", "0.gama", "x"),
    *("\u0660.gamma", "0.layers.0.weight", "0.layers.00.weight", f"0.layers.{'9' * 5000}.weight", "0.layers.-1.bias"),
    *("0.scale", "0.layer.0.encoder.0.weight", "0.predictor.sizes", "0.predictor.evil", "0.ranking", "0.per_head"),
    *("0 .gamma", "\0", "\ud800"),
]  # fmt: skip


def changed(tensors: Tensors, in_memory: bool) -> st.SearchStrategy[Tensors]:
    """The tensors with one to three changes: of a shape, a kind, a number or a name, one left out or one more."""
    functions = st.sampled_from([*SHAPES, *KINDS, *VALUES, *(ONLY_IN_MEMORY if in_memory else [])])
    keys, more = (
        st.sampled_from(sorted(tensors)),
        st.sampled_from(KEYS if in_memory else [k for k in KEYS if k != "\ud800"]),
    )

    def apply(t: Tensors, change: Callable[[Tensors], Tensors]) -> Tensors:
        try:
            return change(t)
        except (RuntimeError, IndexError, TypeError, AttributeError, NotImplementedError):
            return t  # a change that the tensor does not allow, after another one

    change = st.one_of(
        st.builds(lambda k, f: lambda t: {**t, k: f(t[k])} if k in t else t, keys, functions),
        st.builds(lambda k, f: lambda t: {**t, k: f(t[k])} if k in t else t, keys, functions),
        st.builds(lambda k: lambda t: {n: v for n, v in t.items() if n != k}, keys),
        st.builds(lambda k, to: lambda t: _renamed(t, k, to), keys, more),
        st.builds(lambda k: lambda t: {**t, k: torch.ones(HEADS)}, more),
    )

    def all_of(changes: list[Callable[[Tensors], Tensors]]) -> Tensors:
        out = tensors
        for one in changes:
            out = apply(out, one)
        return out

    return st.builds(all_of, st.lists(change, min_size=0, max_size=3))


@names
@runs(130)
def test_tensors_in_memory(name: str, examples: int) -> None:
    method, settings, tensors = PATCHES[name]
    own = {f"0.{k}": t for k, t in tensors.items()}
    ran: list[bool] = []

    @fixed(examples)
    @given(changed(own, in_memory=True))
    def run(given_tensors: Tensors) -> None:
        config = make_config(method, settings)
        ran.append(refused_or_finite(lambda: (PatchConfig([config], None, given_tensors), {})))

    run()
    assert any(ran)


@names
@runs(50)
def test_tensors_through_files(name: str, examples: int, tmp_path: Path) -> None:
    """Written with safetensors alone, as another program would, beside a config that says nothing of them."""
    method, settings, tensors = PATCHES[name]
    own = {f"0.{k}": t for k, t in tensors.items()}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"methods": [{"method": method, **settings}]}))

    @fixed(examples)
    @given(changed(own, in_memory=False))
    def run(given_tensors: Tensors) -> None:
        (tmp_path / TENSOR_FILE).write_bytes(save({k: t.contiguous().clone() for k, t in given_tensors.items()}))
        refused_or_finite(lambda: (PatchConfig.from_pretrained(tmp_path), {}))

    run()


WORDS = st.sampled_from(["method", "window", "sink", "layers", "gamma", "heads", "sparse_settings", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5) | WORDS, x, max_size=3),
    max_leaves=6,
)  # fmt: skip
VERSIONS = st.sampled_from(
    ["0.1.0", "99.0", "1.²", "9" * 5000, "1." * 2000, "", "x", "-1", "1e9", " 1", "0.1.0.dev3", None, 1, [1]]
)


def cut_and_changed(data: bytes) -> st.SearchStrategy[bytes]:
    """A file's bytes, cut off, with bytes changed, put in or said twice."""
    place, some = st.integers(0, len(data)), st.binary(max_size=6)
    return st.one_of(
        st.builds(lambda n: data[:n], place),
        st.builds(lambda n, b: data[:n] + b + data[n + len(b) :], place, some),
        st.builds(lambda n, b: data[:n] + b + data[n:], place, some),
        st.builds(lambda n, m: data[:n] + data[m:], place, place),
        st.builds(lambda n: data[:8] + data[8 : n + 8] * 2 + data[n + 8 :], place),
        st.sampled_from(
            [data.decode("latin-1").encode("utf-16"), b"\xef\xbb\xbf" + data, b"[" * 100_000, b"\x80\x04N.", b""]
        ),
    )


@pytest.mark.parametrize("name", ["zerotuning", "gated", "dhsa", "vertical_slash"])
@runs(130)
def test_files_with_other_bytes(name: str, examples: int, tmp_path: Path) -> None:
    method, settings, tensors = PATCHES[name]
    own = {f"0.{k}": t for k, t in tensors.items()}
    PatchConfig([make_config(method, settings)], None, own).save_pretrained(tmp_path)
    text, weights = ((tmp_path / n).read_bytes() for n in (CONFIG_FILE, TENSOR_FILE))
    loose = json.dumps({k: v for k, v in json.loads(text).items() if "sha" not in k}).encode()

    @fixed(examples)
    @given(
        st.sampled_from([text, loose]) | cut_and_changed(text) | cut_and_changed(loose),
        st.just(weights) | cut_and_changed(weights) | cut_and_changed(weights),
    )
    def run(config: bytes, model: bytes) -> None:
        (tmp_path / CONFIG_FILE).write_bytes(config)
        (tmp_path / TENSOR_FILE).write_bytes(model)
        refused_or_finite(lambda: (PatchConfig.from_pretrained(tmp_path), {}))

    run()


@runs(300)
def test_configs_of_any_shape(examples: int) -> None:
    """JSON that is nearly a patch config: odd versions, entries, names and values."""
    entry = st.builds(
        lambda m, more: {"method": m, **more},
        st.sampled_from(["streaming", "zerotuning", "flux", "act", "nothing"]) | JSON,
        st.dictionaries(WORDS, JSON, max_size=2),
    )
    whole = st.fixed_dictionaries(
        {"methods": st.lists(entry, max_size=3) | JSON},
        optional={"hfpatch_version": VERSIONS, "base_model_name_or_path": JSON, "tensors_sha256": JSON, "extra": JSON},
    )

    @fixed(examples)
    @given(whole | JSON)
    def run(data: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CONFIG_FILE).write_text(json.dumps(data), encoding="utf-8")
            refused_or_finite(lambda: (PatchConfig.from_pretrained(folder), {}))
        refused_or_finite(lambda: (PatchConfig.from_dict(data), {}))

    run()
