"""Reading masks: what counts as padding, what is refused, and when an answer may be reused."""

import gc
import threading
from typing import Any

import pytest
import torch
import zoo
from test_invariants import LENGTH, assert_close, built
from torch import Tensor

from hfpatch import patched
from hfpatch.runtime import padding
from hfpatch.runtime.padding import row_groups
from hfpatch.runtime.row_slice import RowSlice

FORMS = ["bool", "additive", "half", "2-D"]


def causal(valid: Tensor, lq: int) -> Tensor:
    """Bool `[B, 1, lq, L]` of causality and `valid [B, L]`."""
    total = valid.shape[1]
    i, j = torch.arange(total - lq, total)[:, None], torch.arange(total)
    return ((j <= i) & valid[:, None].bool())[:, None]


def as_form(keep: Tensor, valid: Tensor, form: str) -> Tensor:
    if form == "2-D":
        return valid.long()
    if form == "bool":
        return keep
    dtype = torch.float16 if form == "half" else torch.float32
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


def rows(*spans: tuple[int, int], length: int = 9) -> Tensor:
    at = torch.arange(length)
    return torch.stack([(at >= a) & (at < b) for a, b in spans])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lq", [9, 4, 1])
def test_ranges_of_real_tokens(form: str, lq: int) -> None:
    valid = rows((0, 9), (3, 9), (0, 9), (3, 9))
    want = [RowSlice((0, 2), 0, 9), RowSlice((1, 3), 3, 9)]
    assert row_groups(as_form(causal(valid, lq), valid, form), 4, lq, 9) == want


@pytest.mark.parametrize("form", FORMS)
def test_right_padding_and_empty_rows(form: str) -> None:
    valid = rows((0, 9), (0, 5), (0, 0))
    want = [RowSlice((0,), 0, 9), RowSlice((1,), 0, 5), RowSlice((2,), 0, 0)]
    assert row_groups(as_form(causal(valid, 9), valid, form), 3, 9, 9) == want


def test_unused_slots_of_a_static_cache_are_cut() -> None:
    valid = rows((2, 9))
    keep = torch.nn.functional.pad(causal(valid, 3), (0, 7))
    assert row_groups(keep, 1, 3, 9) == [RowSlice((0,), 2, 9)]


def test_no_mask_and_one_mask_for_all_rows() -> None:
    assert row_groups(None, 3, 9, 9) == [RowSlice((0, 1, 2), 0, 9)]
    keep = causal(rows((2, 9)), 9).expand(3, -1, -1, -1)
    assert row_groups(keep, 3, 9, 9) == [RowSlice((0, 1, 2), 2, 9)]


def test_pad_queries_that_see_everything_are_padding() -> None:
    """Some masks let a query without any key see all of them, to keep softmax finite."""
    valid = rows((3, 9))
    keep = causal(valid, 9)
    keep[:, :, :3] = True
    assert row_groups(keep, 1, 9, 9) == [RowSlice((0,), 3, 9)]


def test_packed_sequences_are_not_padding() -> None:
    keep = causal(rows((0, 9)), 9) & torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).bool()
    assert row_groups(keep, 1, 9, 9) == "a mask that is more than causality and padding"


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_any_change_of_a_causal_mask_is_seen(form: str) -> None:
    """Flip one entry at a time; only the very last one makes a mask that is padding again."""
    valid = rows((0, 9), (2, 9))
    plain = causal(valid, 9)
    for b in range(2):
        for i in range(9):
            for j in range(9):
                if i == j == 8:
                    continue
                keep = plain.clone()
                keep[b, 0, i, j] ^= True
                groups = row_groups(as_form(keep, valid, form), 2, 9, 9)
                assert isinstance(groups, str), (b, i, j)


def test_a_bias_in_the_mask_is_refused() -> None:
    keep = causal(rows((0, 9)), 9)
    mask = as_form(keep, keep, "additive") + torch.where(keep, -0.5, 0.0)
    assert isinstance(row_groups(mask, 1, 9, 9), str)
    mask = as_form(keep, keep, "additive")
    mask[..., 8, 3] = -0.5
    assert isinstance(row_groups(mask, 1, 9, 9), str)


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_one_query_may_see_less_than_all(form: str) -> None:
    """At decode a hole is padding inside a row, not a range."""
    keep = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    keep[..., 4] = False
    assert row_groups(as_form(keep, keep, form), 1, 1, 9) == "padding inside a row"


@pytest.mark.parametrize(
    "shape,reason",
    [((1, 1, 9, 7), "shorter"), ((1, 2, 9, 9), "between heads"), ((1, 9, 9), "unusual"), ((1, 1, 5, 9), "unusual")],
)
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...], reason: str) -> None:
    answer = row_groups(torch.ones(shape, dtype=torch.bool), 1, 9, 9)
    assert isinstance(answer, str) and reason in answer


def test_large_masks_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "_CHUNK", 20)
    valid = rows((0, 9), (2, 9))
    keep = causal(valid, 9)
    assert len(row_groups(keep, 2, 9, 9)) == 2
    other = keep.clone()
    other[1, 0, 8, 5] = False
    assert isinstance(row_groups(other, 2, 9, 9), str)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_an_answer_does_not_outlive_the_masks_content(inference: bool) -> None:
    with torch.inference_mode(inference):
        mask = causal(rows((0, 9)), 9)
        assert row_groups(mask, 1, 9, 9) == [RowSlice((0,), 0, 9)]
        mask[..., :2] = False
        mask[..., :2, :] = False
        assert row_groups(mask, 1, 9, 9) == [RowSlice((0,), 2, 9)]
        assert row_groups(mask[..., :5, :5], 1, 5, 5) == [RowSlice((0,), 2, 5)]


def test_an_answer_is_not_given_to_another_mask_at_the_same_address() -> None:
    gc.collect()
    for start in (0, 1, 2, 0, 3):
        mask = causal(rows((start, 9)), 9)
        assert row_groups(mask, 1, 9, 9) == [RowSlice((0,), start, 9)]
        del mask


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_share_one_reading(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = padding._read

    def reading(*args: Any) -> Any:
        reads.append(1)
        return original(*args)

    monkeypatch.setattr(padding, "_read", reading)
    model = built("llama")
    batch, mask = zoo.left_pad(zoo.prompt(model, 2, LENGTH), [LENGTH, 30])
    with patched(model, "streaming", sink=2, window=8), mode():
        model(batch, attention_mask=mask)
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_users_mask_changed_in_place_between_forwards(name: str, mode: Any) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, "streaming", sink=2, window=8), mode():
        plain = causal(torch.ones(2, LENGTH), LENGTH)
        floats = as_form(plain, plain, "additive")
        masks = {"full_attention": floats, "sliding_attention": floats} if name == "gemma2" else floats
        first = model(ids, attention_mask=masks, use_cache=False).logits
        floats[1, :, :, :20] = torch.finfo(torch.float32).min
        second = model(ids, attention_mask=masks, use_cache=False).logits
        assert_close("row 0", second[0], first[0])
        assert float((second[1, 20:] - first[1, 20:]).abs().max()) > 1e-2
        fresh = as_form(causal(rows((0, LENGTH), (20, LENGTH), length=LENGTH), LENGTH), floats, "additive")
        masks = {"full_attention": fresh, "sliding_attention": fresh} if name == "gemma2" else fresh
        assert_close("row 1", second[1, 20:], model(ids, attention_mask=masks, use_cache=False).logits[1, 20:])


def test_threads_read_their_own_masks() -> None:
    wrong: list[int] = []

    def work(start: int) -> None:
        for _ in range(200):
            mask = causal(rows((start, 9)), 9)
            for _ in range(3):
                if row_groups(mask, 1, 9, 9) != [RowSlice((0,), start, 9)]:
                    wrong.append(start)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
