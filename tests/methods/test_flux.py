"""Flux: routes are kept, rows are independent, and the router is the one described."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from torch import Tensor
from torch.nn import functional as F

from hfpatch import ConfigError, IncompatibleMethodsError, PatchConfig, UnsupportedModelError, get_patch, patched
from hfpatch.config.registry import get_method, make_config
from hfpatch.methods.flux import FluxConfig
from hfpatch.methods.flux.router import FULL, Router, Routers, pool_ends

SPARSE = {"sparse": "streaming", "sparse_settings": {"sink": 2, "window": 8}}
LENGTH = 63


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max() / want.abs().max()) <= 1e-5


def undecided(layers: int = 3, dim: int = 16) -> PatchConfig:
    """Learned routers with large random weights, so that prompts differ in their routes."""
    torch.manual_seed(3)
    routers = Routers(range(layers), dim)
    for p in routers.parameters():
        torch.nn.init.normal_(p, std=0.6)
    tensors = {f"0.{k}": t for k, t in routers.state_dict().items()}
    return PatchConfig([FluxConfig(router="learned", pool=10, **SPARSE)], tensors=tensors)


def routes(model: Any) -> list[list[bool]]:
    flux: Any = get_patch(model).methods[0]
    return [[flux.last[n][r] for n in sorted(flux.last)] for r in sorted(flux.last[min(flux.last)])]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_batch_of_mixed_routes_equals_each_row_alone(name: str) -> None:
    model = zoo.SUPPORTED[name].build()
    lengths = [63, 50, 41, 30]
    ids = zoo.prompt(model, 4, LENGTH)
    batch, mask = zoo.left_pad(ids, lengths)
    with patched(model, undecided()):
        together = logits(model, batch, attention_mask=mask)
        chosen = routes(model)
        flat = {s for row in chosen for s in row}
        assert flat == {True, False} and len({tuple(r) for r in chosen}) > 1
        for row, n in enumerate(lengths):
            assert close(together[row, -n:], logits(model, ids[row : row + 1, :n])[0])
            assert routes(model)[0] == chosen[row]


def test_the_route_stays_through_decode_and_turns_on_the_prompt_alone() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, LENGTH)
    other = zoo.prompt(model, 2, LENGTH, seed=9)
    with patched(model, undecided()) as patch:
        found = {}
        for name, tail in (("same", ids), ("other", other)):
            with torch.no_grad():
                out = model(ids[:, :40], use_cache=True)
                before = routes(model)
                for n in range(40, LENGTH):
                    out = model(tail[:, n : n + 1], past_key_values=out.past_key_values)
            assert routes(model) == before
            found[name] = before
        assert found["same"] == found["other"]
        calls: Any = patch.methods[0]
        assert sum(sum(c.values()) for c in calls.frequency.values()) == 2 * 2 * 3


def test_beams_keep_their_prompt_s_route() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 3, 40)
    with patched(model, undecided()):
        together = model.generate(ids, num_beams=2, max_new_tokens=6, do_sample=False)
        for row in range(3):
            alone = model.generate(ids[row : row + 1], num_beams=2, max_new_tokens=6, do_sample=False)
            assert torch.equal(together[row], alone[0])


def test_all_full_is_dense_bit_for_bit_through_the_base() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 3, LENGTH)
    want = logits(model, ids)
    with patched(model, "flux", router="static", **SPARSE) as patch:
        assert torch.equal(logits(model, ids), want)
        assert all(set(line.stats.executors) == {"sdpa"} for line in patch.report().lines)
    start = PatchConfig([FluxConfig(router="learned", **SPARSE)])
    start.tensors = {f"0.{k}": t for k, t in Routers(range(3), 16).state_dict().items()}
    with patched(model, start):
        assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("name", [t.name for t in zoo.SUPPORTED.values() if not t.all_sliding])
def test_all_sparse_is_the_plain_sparse_patch(name: str) -> None:
    model = zoo.SUPPORTED[name].build()
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, "streaming", **SPARSE["sparse_settings"]):
        want = logits(model, ids)
    with patched(model, "flux", router="static", sparse_layers="0-", **SPARSE):
        assert torch.equal(logits(model, ids), want)


POINTS = {c.name: get_method(c.name).points() for c in METHODS}
SELECTING = [c for c in METHODS if "select" in POINTS[c.name] and "route" not in POINTS[c.name]]


@pytest.mark.parametrize("case", SELECTING, ids=str)
def test_any_selecting_method_can_be_the_sparse_branch(case: MethodCase) -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, LENGTH)
    cuts = [0, 56, 57, 58, 59, LENGTH]
    found = []
    for config in (
        make_config(case.name, dict(case.settings)),
        FluxConfig(sparse=case.name, sparse_settings=dict(case.settings), sparse_layers="0-"),
    ):
        with patched(model, config) as patch, torch.no_grad():
            cache, parts = None, []
            for a, b in itertools.pairwise(cuts):
                out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            found.append(torch.cat(parts, 1))
            assert patch.report().density() < 1
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_with_chunked_prefill_the_first_chunk_decides() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 3, LENGTH)
    with patched(model, undecided()), torch.no_grad():
        out = model(ids[:, :25], use_cache=True)
        first = routes(model)
        assert len({tuple(r) for r in first}) > 1
        model(ids[:, 25:], past_key_values=out.past_key_values)
        assert routes(model) == first
        logits(model, ids)
        assert routes(model) != first


def test_router_equals_a_plain_reading() -> None:
    torch.manual_seed(0)
    router = Router(8)
    for p in router.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 8)
    w = dict(router.named_parameters())
    h = F.silu(x @ w["encoder.0.weight"].T + w["encoder.0.bias"]) @ w["encoder.2.weight"].T + w["encoder.2.bias"]
    h = F.silu(h @ w["head.0.weight"].T + w["head.0.bias"])
    h = F.silu(h @ w["head.2.weight"].T + w["head.2.bias"])
    want = h @ w["head.4.weight"].T + w["head.4.bias"]
    assert torch.allclose(router(x), want, atol=1e-5)
    assert [tuple(t.shape) for n, t in w.items() if n.endswith("weight")] == [
        (64, 8),
        (16, 64),
        (32, 16),
        (8, 32),
        (2, 8),
    ]


def test_a_new_router_is_fully_dense() -> None:
    assert (Router(8)(torch.randn(5, 8)).argmax(-1) == FULL).all()


@pytest.mark.parametrize("length", [1, 7, 10, 15, 40])
def test_pooling_equals_a_loop(length: int) -> None:
    queries = torch.randn(2, length, 4, 8)
    total = torch.zeros(2, 8)
    n = min(10, length)
    picked = [*range(n), *range(length - n, length)]
    for t in picked:
        for h in range(4):
            total += queries[:, t, h]
    assert torch.allclose(pool_ends(queries, 10), total / (len(picked) * 4), atol=1e-6)


def test_entropy_ranking_and_report() -> None:
    model = zoo.SUPPORTED["llama"].build()
    config = PatchConfig([FluxConfig(router="entropy", sparsity=0.67, **SPARSE)])
    config.tensors = {"0.ranking": torch.tensor([0.2, 0.9, 0.1])}
    with patched(model, config) as patch:
        logits(model, zoo.prompt(model, 2, LENGTH))
        assert routes(model) == [[True, False, True]] * 2
        text = str(patch.report())
    assert "flux routed 67% of layers to streaming; by layer 0: 100%, 1: 0%, 2: 100%" in text
    assert "row 0: sFs; row 1: sFs" in text


@pytest.mark.parametrize("tolerance,share", [(1e9, 1.0), (0.0, 0.0)])
def test_oracle_tries_both(tolerance: float, share: float) -> None:
    model = zoo.SUPPORTED["llama"].build()
    with patched(model, "flux", router="oracle", tolerance=tolerance, **SPARSE) as patch:
        logits(model, zoo.prompt(model, 2, LENGTH))
        flux: Any = patch.methods[0]
        assert flux.sparse_share() == share


def test_routers_survive_saving(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 3, LENGTH)
    with patched(model, undecided()) as patch:
        want = logits(model, ids)
        patch.save_pretrained(tmp_path)
    with patched(model, PatchConfig.from_pretrained(tmp_path)):
        assert torch.equal(logits(model, ids), want)


def test_what_cannot_work_is_refused() -> None:
    model = zoo.SUPPORTED["llama"].build()
    with pytest.raises(ConfigError, match="needs trained routers"), patched(model, "flux", router="learned"):
        pass
    with pytest.raises(ConfigError, match="needs a ranking"), patched(model, "flux", router="entropy"):
        pass
    with (
        pytest.raises(IncompatibleMethodsError, match="cannot route to 'dense'"),
        patched(model, "flux", sparse="dense"),
    ):
        pass
    with pytest.raises(UnsupportedModelError, match="none for"), patched(model, undecided(layers=2)):
        pass
    with (
        pytest.raises(UnsupportedModelError, match="queries before RoPE"),
        patched(zoo.SUPPORTED["phi3"].build(), undecided()),
    ):
        pass
    with pytest.raises(IncompatibleMethodsError, match="both route"), patched(model, [FluxConfig(), FluxConfig()]):
        pass
