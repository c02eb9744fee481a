"""`vertical_slash` against its plain-loop definition, and the published per-head budgets."""

import json

import pytest
import torch
import zoo
from method_calls import SHAPES, check_executors, chosen_mask, make_call, make_method
from oracles import vertical_slash

from hfpatch import PatchConfig, patched
from hfpatch.errors import ConfigError
from hfpatch.methods.vertical_slash import line_sums

OWN = dict(estimate=16, sink=3, local=6)


@pytest.mark.thin(2)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", ["group", "head", "all"])
@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (16, 8), (8, 16)], ids=str)
def test_equals_the_formula(shape, share, sizes):
    call = make_call(SHAPES[shape], dv=24)
    own = dict(OWN, block_q=sizes[0], block_k=sizes[1], head_sharing=share)
    method = make_method("vertical_slash", min_length=0, vertical=12, slash=20, **own)
    assert torch.equal(chosen_mask(method, call), vertical_slash(call, [(12, 20)] * call.Hq, **own))
    if sizes != (1, 1):
        check_executors(method, call)


@pytest.mark.parametrize("shape", SHAPES)
def test_keep_all_is_dense(shape):
    call = make_call(SHAPES[shape])
    keep = chosen_mask(make_method("vertical_slash", min_length=0, block_q=16, block_k=8, vertical=1.0), call)
    want = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)
    assert torch.equal(keep, want.expand_as(keep))


def head_file(path, layers=8, heads=8, kind="vertical_and_slash"):
    rows = [{str(h): [kind, 8 + 4 * h, 12 + layer, 0.5] for h in range(heads)} for layer in range(layers)]
    path.write_text(json.dumps(rows))
    return str(path)


def test_head_config(tmp_path):
    call = make_call(SHAPES["L111-gqa4"])
    path = head_file(tmp_path / "heads.json")
    for share, heads in (("head", range(8)), ("group", (3, 7))):
        own = dict(OWN, block_q=8, block_k=4, head_sharing=share)
        method = make_method("vertical_slash", min_length=0, head_config=path, **own)
        want = vertical_slash(call, [(8 + 4 * h, 12 + call.layer) for h in heads], **own)
        assert torch.equal(chosen_mask(method, call), want)


def test_head_config_is_saved_with_the_patch(tmp_path):
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, 63)
    path = head_file(tmp_path / "heads.json", layers=3)
    settings = dict(min_length=0, block_q=8, block_k=4, head_config=path, **OWN)
    with patched(model, "vertical_slash", **settings) as patch, torch.no_grad():
        want = model(ids).logits
        assert patch.report().density() < 1
        patch.save_pretrained(tmp_path / "patch")
    (tmp_path / "heads.json").unlink()
    with patched(model, PatchConfig.from_pretrained(tmp_path / "patch")), torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_head_config_must_fit(tmp_path):
    model = zoo.SUPPORTED["llama"].build()
    with pytest.raises(
        ConfigError, match=r"per_head is int64 \[2, 8, 2\]; for this model it takes whole numbers \[3, 8, 2\]"
    ):
        patched(model, "vertical_slash", head_config=head_file(tmp_path / "a.json", layers=2)).__enter__()
    with pytest.raises(ConfigError, match="only vertical_and_slash"):
        make_method("vertical_slash", head_config=head_file(tmp_path / "b.json", kind="block_sparse"))
    with pytest.raises(ConfigError, match="cannot be read"):
        make_method("vertical_slash", head_config=str(tmp_path / "none.json"))


def test_a_budget_drops_the_blocks_whose_lines_got_least():
    """Of a tile and a block that column c and diagonals d, d + 1 meet: weight of c plus the mean of both diagonals."""
    call = make_call(SHAPES["L111-gqa4"])
    own = dict(OWN, block_q=8, block_k=8, min_length=0, vertical=24, slash=40)
    lines = make_method("vertical_slash", **own).select(call).block_mask(call.layout)
    few = make_method("vertical_slash", budget=32, **own).select(call).block_mask(call.layout)
    assert torch.equal(few & lines, few) and bool((few.sum(-1) <= 4).all()) and not torch.equal(few, lines)
    columns, diagonals = (
        torch.nn.functional.pad(x.unflatten(1, (2, -1)).sum(2), (0, 1)).unflatten(-1, (-1, 8)).sum(-1)
        for x in line_sums(call, OWN["estimate"])
    )
    for b, h, n in [(0, 0, 13), (1, 1, 9), (2, 0, 6)]:
        score = {m: columns[b, h, m] + diagonals[b, h, n - m - 1 : n - m + 1].mean() for m in range(n)}
        left = [m for m in range(1, n) if lines[b, h, n, m]]
        kept = [m for m in left if few[b, h, n, m] and m < n - 1]  # the sink, the nearest and its own are forced
        assert all(score[m] >= score[x] for m in kept for x in left if not few[b, h, n, x])
